"""`examples/bulk_embed.py` on two workers over a local S3 server: killed and resumed, no row is lost or doubled."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from pyarrow import fs

from modeling_udon import Encoder
from modeling_udon.search.shards import open_embeddings

pytest.importorskip("daft", reason='Daft is an extra: pip install "modeling-udon[bulk]"')
SCRIPT = Path(__file__).parents[1] / "examples" / "bulk_embed.py"
# In an environment of its own: its libraries and the tested ones exclude each other.
SERVER = os.environ.get("UDON_MOTO_SERVER") or shutil.which("moto_server")
NUM_SHARDS = 8
PATIENCE = 120


@pytest.fixture
def s3(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Variables that lead to an S3 server with the bucket `shop`."""
    if SERVER is None:
        pytest.skip("no local S3 server: UDON_MOTO_SERVER must name the moto_server of `pip install 'moto[server]'`")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen([SERVER, "-p", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    variables = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "NO_PROXY": "127.0.0.1",
    }
    try:
        for _ in range(PATIENCE * 5):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.2)
        with pytest.MonkeyPatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            files = fs.S3FileSystem(
                endpoint_override=f"127.0.0.1:{port}", scheme="http", region="us-east-1", allow_bucket_creation=True
            )
            files.create_dir("shop")
            yield variables
    finally:
        server.kill()
        server.wait()


def start(searchable, *options: object) -> subprocess.Popen:
    command = [sys.executable, SCRIPT, "s3://shop/images", "s3://shop/embedded", "--model", searchable.model, *options]
    variables = os.environ | {"PYTHONPATH": str(SCRIPT.parents[1]), "DAFT_ANALYTICS_ENABLED": "0"}
    return subprocess.Popen(
        [*map(str, command)],
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@pytest.mark.long
def test_killed_and_resumed_every_image_is_embedded_once(s3, searchable, tmp_path, udon) -> None:
    store = fs.FileSystem.from_uri("s3://shop/embedded")[0]
    pictures = sorted(searchable.pictures.rglob("*.png"))
    names = [f"{number:03d}.png" for number in range(4 * NUM_SHARDS)]
    for number, name in enumerate(names):
        data = b"no picture" if number == 5 else pictures[number % len(pictures)].read_bytes()
        with store.open_output_stream(f"shop/images/{name}") as stream:
            stream.write(data)

    def parts() -> list[str]:
        found = store.get_file_info(fs.FileSelector("shop/embedded", allow_not_found=True))
        return sorted(info.base_name for info in found if info.base_name.startswith("part-"))

    process = start(searchable, "--workers", 2, "--shard-size", 4)
    try:
        deadline = time.monotonic() + PATIENCE
        while len(parts()) < 2 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
        told = process.communicate()[0]
        done_before = parts()
        assert 2 <= len(done_before) <= NUM_SHARDS, told
        written = {name: store.get_file_info(f"shop/embedded/{name}").mtime for name in done_before}
    finally:
        process.kill()
        process.wait()
    again = start(searchable, "--workers", 2, "--shard-size", 4)
    told, _ = again.communicate(timeout=PATIENCE)
    assert again.returncode == 0, told
    assert f"{NUM_SHARDS} shards, {NUM_SHARDS - len(done_before)} to do" in told
    assert "32 images: 31 embedded once each, 1 skipped" in told
    assert {name: store.get_file_info(f"shop/embedded/{name}").mtime for name in done_before} == written
    (tmp_path / "embedded").mkdir()
    fs.copy_files("shop/embedded", str(tmp_path / "embedded"), source_filesystem=store)
    opened = open_embeddings(tmp_path / "embedded")
    vectors = np.concatenate([found for found, _ in opened.blocks()])
    paths = [path for _, table in opened.blocks() for path in table["path"].to_pylist()]
    assert paths == [name for name in names if name != "005.png"]
    expected = Encoder.open(searchable.model).encode(pictures).embeddings
    order = [number % len(pictures) for number in range(len(names)) if number != 5]
    np.testing.assert_allclose(vectors, expected[order], atol=1e-6)
    indexed = udon("index", tmp_path / "embedded", "--out", tmp_path / "index")
    assert indexed.code == 0 and indexed.out.startswith("31 embeddings of 8 dimensions"), indexed.err
