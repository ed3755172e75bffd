"""An export that is killed leaves what was there, and nothing that looks whole."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ENGINES = {
    "lancedb": (("lancedb",), "lance"),
    "qdrant": (("qdrant_client",), "qdrant"),
    "milvus": (("pymilvus", "milvus_lite"), "milvus.db"),
}
# Exports to a new place and is killed after a third of the rows; exports; exports again and is killed.
PROGRAM = """
import os, signal, sys
from modeling_udon.engines.columns import Columns
from modeling_udon.engines.export import export_index

index, engine, out = sys.argv[1:]
whole = Columns.blocks

def dying(self, size):
    yield next(iter(whole(self, 100)))
    os.kill(os.getpid(), signal.SIGKILL)

for blocks, force, expected in ((dying, False, -signal.SIGKILL), (whole, False, 0), (dying, True, -signal.SIGKILL)):
    process = os.fork()
    if process == 0:
        Columns.blocks = blocks
        export_index(index, engine, out=out, force=force)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    assert code == expected, (code, expected)
"""


def found_in(engine: str, out: str) -> tuple[list[str], int]:
    """The tables that there are, and the rows of the one that was asked for."""
    if engine == "lancedb":
        import lancedb

        database = lancedb.connect(out)
        return database.list_tables().tables, database.open_table("images").count_rows()
    if engine == "qdrant":
        from qdrant_client import QdrantClient

        client = QdrantClient(path=out)
        names = [alias.alias_name for alias in client.get_aliases().aliases]
        names += [each.name for each in client.get_collections().collections if not each.name.startswith("images__")]
        found = names, client.count("images").count
        client.close()
        return found
    from pymilvus import MilvusClient

    client = MilvusClient(out)
    names = [name for name in client.list_collections() if not name.startswith("images__draft_")]
    found = names, int(client.query("images", filter="", output_fields=["count(*)"])[0]["count(*)"])
    client.close()
    return found


@pytest.mark.parametrize("engine", ENGINES)
def test_a_killed_export_is_never_taken_for_a_whole_one(engine, shop, tmp_path, udon) -> None:
    for library in ENGINES[engine][0]:
        pytest.importorskip(library, reason=f"{engine} is an extra")
    out = str(tmp_path / ENGINES[engine][1])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, shop, engine, out],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert found_in(engine, out) == (["images"], 300)
    assert udon("export-index", "--index", shop, "--to", engine, "--out", out, "--force").code == 0
    if engine in ("qdrant", "milvus"):
        assert left_over(engine, out) == 1


def left_over(engine: str, out: str) -> int:
    """All collections, drafts included."""
    if engine == "qdrant":
        from qdrant_client import QdrantClient

        client = QdrantClient(path=out)
        number = len(client.get_collections().collections)
    else:
        from pymilvus import MilvusClient

        client = MilvusClient(out)
        number = len(client.list_collections())
    client.close()
    return number
