"""A domain is streamed from a data set on the Hub by ranges of its files."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import loopback
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Features, Image, Value
from loopback import LoopbackHub

ROOT = Path(__file__).parents[2]
IMAGE_BYTES = 100_000

PROGRAM = """
import json
from modeling_udon.data.domains import (open_domain)
from modeling_udon.domain_spec import DomainSpec
spec = DomainSpec(path="me/cars", streaming=True, validation_split=None, test_split=None)
domain = open_domain("cars", spec)
images = domain.images[[13, 0, 39]]["image"]
print(json.dumps([len(domain.images), domain.labels.tolist(), [image["bytes"].hex()[:8] for image in images]]))
"""


def test_opening_takes_labels_and_reading_takes_the_row_groups_of_the_rows(
    shared_hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent, send = [], loopback._Handler._send

    def counted(self: Any, status: int, body: bytes, headers: Any) -> None:
        sent.append(len(body))
        send(self, status, body, headers)

    monkeypatch.setattr(loopback._Handler, "_send", counted)
    schema = Features({"image": Image(), "label": Value("int64")}).arrow_schema
    files = {}
    for shard in range(2):
        rows = range(20 * shard, 20 * shard + 20)
        # Every image from its own generator, so that no row group can be packed.
        images = [{"bytes": bytes([row]) * 4 + os.urandom(IMAGE_BYTES), "path": None} for row in rows]
        table = pa.Table.from_pydict({"image": images, "label": [row % 3 for row in rows]}, schema)
        pq.write_table(table, tmp_path / "train.parquet", row_group_size=5)
        files[f"train-{shard}.parquet"] = (tmp_path / "train.parquet").read_bytes()
    shared_hub.add("datasets", "me/cars", files)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | shared_hub.environment(tmp_path / "home"),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    num_images, labels, first = json.loads(done.stdout.splitlines()[-1])
    assert num_images == 40 and labels == [row % 3 for row in range(40)]
    assert first == [f"{row:02x}" * 4 for row in (13, 0, 39)]
    stored = sorted((tmp_path / "home").rglob("*.arrow"))
    assert [path.stem for path in stored] == ["00000000", "00000002", "00000007"]
    assert not list((tmp_path / "home").rglob("*.parquet"))
    # Three row groups of five images of forty; opening a file takes its last 64 KiB, which is done seven times.
    assert 15 * IMAGE_BYTES < sum(sent) < 15 * IMAGE_BYTES + 7 * 2**16 + 50_000
