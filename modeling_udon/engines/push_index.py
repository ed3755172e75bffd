"""`udon push-index`: an index as a Lance table in a data set on the Hub, where it is searched without a download."""

import os
import re
import shlex
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import DatasetCardData, HfApi

from modeling_udon.engines.columns import Columns
from modeling_udon.engines.export import ExportedIndex, export_index
from modeling_udon.engines.lance_address import TABLE
from modeling_udon.hub.commit import Target, publish, said_in_one_line
from modeling_udon.search.image_index import ImageIndex
from modeling_udon.search.results_page import html_text
from modeling_udon.storage import write_text

CARD_FILE = "README.md"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_OWN_FILES = (f"{TABLE}.lance/*",)
_SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"))
_LARGEST = "10M<n<100M"


@dataclass(frozen=True)
class PushedIndex:
    """What a push published: its address, `None` after a dry run, and the size in bytes of each file."""

    url: str | None
    files: dict[str, int]


def push_index(
    index: str | os.PathLike[str],
    repo: str,
    *,
    model: str | None = None,
    private: bool = False,
    revision: str | None = None,
    tag: str | None = None,
    create_pr: bool = False,
    license: str | None = None,
    thumbnails: bool = False,
    paths: bool = True,
    dry_run: bool = False,
    say: Callable[[str], None] = lambda text: None,
    api: HfApi | None = None,
) -> PushedIndex:
    """Publishes an index as one commit of a data set. Of this machine's folders nothing is told.

    Args:
        index: Folder that `udon index` wrote.
        repo: Data set on the Hub, `owner/name`, made if need be.
        model: Hub id of the model of the index, for the card; `None`: what the index calls it.
        private: Whether the data set must be private; one that is made is made so.
        revision: Branch to commit to, made if need be; `None` is the main one.
        tag: Tag of the commit.
        create_pr: Whether the commit goes into a pull request.
        license: Licence that the card states.
        thumbnails: Whether thumbnails that were kept are published.
        paths: Whether paths are published; of absolute ones only the last part is.
        dry_run: Only says which files would be published, and asks the Hub nothing.
        say: Called with lines for the user.
        api: The client; by default the one of the user's own login.

    Raises:
        ValueError: If the index is none, or an argument cannot be used.
        ImportError: If LanceDB is missing.
        PushError: If the Hub refuses, fails, or cannot be reached.
    """
    message = "Upload the index with udon push-index"
    target = Target(repo, private, revision, tag, create_pr, kind="dataset", message=message)
    opened = ImageIndex(index)
    columns = Columns.of(opened, thumbnails, paths)
    command = shlex.join(["udon", "push-index", "--index", str(index), "--repo", repo])
    with tempfile.TemporaryDirectory(prefix="udon-push-index-") as folder:
        done = export_index(
            index, "lancedb", out=folder, thumbnails=thumbnails, paths=paths, is_public=True, model=model, say=say
        )
        shown = opened.about.model if model is None else model
        write_text(Path(folder, CARD_FILE), _card(repo, shown, opened, columns.names, done, license))
        found = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        files = {path.relative_to(folder).as_posix(): path for path in found}
        sizes = {name: path.stat().st_size for name, path in files.items()}
        say(f"{len(files)} files, {sum(sizes.values()):,} bytes, for the data set {repo}")
        if dry_run:
            return PushedIndex(None, sizes)
        with said_in_one_line(repo, Path(index), command):
            url = publish(api or HfApi(), files, target, tag, _OWN_FILES, say)
    say(f"pushed {url}")
    say(f"search it: udon search photo.jpg --index hf://datasets/{repo} --model {shown}")
    return PushedIndex(url, sizes)


def _card(
    repo: str, model: str, index: ImageIndex, columns: Sequence[str], done: ExportedIndex, license: str | None
) -> str:
    about = index.about
    is_on_hub = _HUB_ID.fullmatch(model) is not None and not os.path.exists(model)
    name = model if is_on_hub else Path(model).name
    size = next((label for most, label in _SIZES if about.num_images < most), _LARGEST)
    data = DatasetCardData(
        license=license,
        tags=["udon", "image-retrieval", "lance", "vector-search"],
        size_categories=[size],
        task_categories=["image-feature-extraction"],
    )
    recall = "" if done.recall is None else f" Recall@10 against exact search: {100 * done.recall:.1f} %."
    listed = "\n".join(f"- {_code(column)}, {index.schema.field(column).type}" for column in columns)
    return f"""---
{data.to_yaml()}
---

# {html_text(repo.partition("/")[2])}

An index of {about.num_images:,} images for similarity search: {about.dim}-d embeddings by
{_code(name)} ([UDON](https://arxiv.org/abs/2406.08332)), fingerprint `{about.fingerprint}`, as a
[Lance](https://lancedb.github.io/lance/) table that is searched where it lies.{recall}

```bash
pip install "modeling-udon[lancedb]"
udon search photo.jpg --index hf://datasets/{repo} --model {name if is_on_hub else "MODEL"}
```

```python
import lancedb
from modeling_udon import Encoder

table = lancedb.connect("hf://datasets/{repo}").open_table("{TABLE}")
query = Encoder.open("{name if is_on_hub else "MODEL"}").encode(["photo.jpg"]).embeddings[0]
table.search(query, vector_column_name="embedding").distance_type("dot").limit(5).to_pandas()
```

Columns beside `row` and `embedding`:

{listed}
"""


def _code(text: str) -> str:
    """A name from data as code that Markdown cannot be led out of."""
    return f"<code>{html_text(text)}</code>"
