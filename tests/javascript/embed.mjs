// Embeds pictures with @huggingface/transformers in the two ways that the documentation names; prints JSON.
// node embed.mjs FOLDER_OF_MODELS MODEL PICTURE...
import { AutoModel, RawImage, Tensor, env, pipeline } from "@huggingface/transformers";

const [models, name, ...pictures] = process.argv.slice(2);
env.localModelPath = models;
env.allowRemoteModels = false;
const pipe = await pipeline("image-feature-extraction", name);
const model = await AutoModel.from_pretrained(name, { model_file_name: "model_pixels" });
const embedded = [];
for (const picture of pictures) {
  const image = (await RawImage.read(picture)).rgb();
  const pixels = new Tensor("uint8", image.data, [1, image.height, image.width, 3]);
  const { image_embeds } = await model({ pixel_values: pixels });
  const pooled = await pipe(image, { pool: true });
  embedded.push({ pixels: Array.from(image_embeds.data), pipeline: Array.from(pooled.data) });
}
console.log(JSON.stringify(embedded));
