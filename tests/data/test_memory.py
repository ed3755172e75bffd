"""Memory does not grow with the images that have been read."""

import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Features, Image, Value

NUM_IMAGES, IMAGE_BYTES = 40_000, 2_000

# In a process of its own, whose memory nobody else has used before. Lines: MiB before, opened, read.
PROGRAM = """
import json, sys
from pathlib import Path
import numpy as np
from modeling_udon.data.domains import (open_domain)
from modeling_udon.domain_spec import DomainSpec

def mib():
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss_Anon:")) / 1024

spec = dict(validation_split=None, test_split=None, streaming=sys.argv[2] == "streamed", shuffle_window=1000)
measured = []
for folder in sys.argv[1].split(","):
    before = mib()
    domain = open_domain("many", DomainSpec(path=folder, **spec))
    opened, seen = mib(), 0
    for start in range(0, len(domain.images), 100):
        seen += len(domain.images[list(range(start, min(start + 100, len(domain.images))))]["image"])
    assert seen == len(domain.images)
    measured.append(mib() - before)
print(json.dumps(measured))
"""


def write(folder: Path, num_images: int) -> Path:
    folder.mkdir()
    schema = Features({"image": Image(), "label": Value("string")}).arrow_schema
    images = [{"bytes": row.to_bytes(4, "big") * (IMAGE_BYTES // 4), "path": None} for row in range(num_images)]
    table = pa.Table.from_pydict({"image": images, "label": [f"{row // 50}" for row in range(num_images)]}, schema)
    pq.write_table(table, folder / "train.parquet", row_group_size=100, compression="NONE", use_dictionary=False)
    return folder


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux")
@pytest.mark.parametrize("how", ["map-style", "streamed"])
def test_reading_forty_thousand_images_keeps_none_of_them(
    tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    # The small one first: what libraries take once is not counted against the large one.
    folders = [write(tmp_path / str(size), size) for size in (2_000, NUM_IMAGES)]
    words = [",".join(map(str, folders)), how]
    done = subprocess.run([sys.executable, "-c", PROGRAM, *words], stdout=subprocess.PIPE, text=True, check=True)
    _, growth = json.loads(done.stdout.splitlines()[-1])
    assert growth < NUM_IMAGES * IMAGE_BYTES / 2**20 / 2
