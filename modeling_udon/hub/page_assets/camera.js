// A picture from the camera, in a dialog.

export function offersCamera() {
  return Boolean(navigator.mediaDevices?.getUserMedia);
}

// Resolves with a picture, or null where the visitor has closed the dialog; rejects where there is no camera.
export async function takePicture(dialog, video, shoot, cancel) {
  const stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
  video.srcObject = stream;
  dialog.showModal();
  const over = new AbortController();
  try {
    return await new Promise((resolve) => {
      const take = () => {
        const canvas = document.createElement("canvas");
        [canvas.width, canvas.height] = [video.videoWidth, video.videoHeight];
        canvas.getContext("2d").drawImage(video, 0, 0);
        canvas.toBlob(resolve, "image/png");
      };
      shoot.addEventListener("click", take, { signal: over.signal });
      cancel.addEventListener("click", () => resolve(null), { signal: over.signal });
      dialog.addEventListener("close", () => resolve(null), { signal: over.signal });
    });
  } finally {
    over.abort();
    for (const track of stream.getTracks()) track.stop();
    video.srcObject = null;
    dialog.close();
  }
}
