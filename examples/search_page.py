"""A search page of a run's test pictures, without a server: `python examples/search_page.py runs/demo`.

Writes the pictures as files, embeds and indexes all but a few, which become the page's examples, and exports the page.
"""

import argparse
import shutil
from collections import Counter
from pathlib import Path

from modeling_udon import Encoder, build_index, embed
from modeling_udon.data.domains import encoded_bytes, open_domain
from modeling_udon.hub.page import PageOptions, export_page
from modeling_udon.run_record import read_run
from modeling_udon.search.examples import MAX_EXAMPLES
from modeling_udon.search.source_spec import SourceSpec


def write_pictures(run: Path, pictures: Path, queries: Path) -> None:
    """Writes `pictures/DOMAIN/CLASS-NUMBER.png`; the first picture of some classes of each domain goes to `queries`."""
    record = read_run(run)
    for folder in (pictures, queries):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    domains = {name: open_domain(name, spec, record.seed) for name, spec in record.domains.items()}
    for name, domain in domains.items():
        (pictures / name).mkdir()
        split = domain.evaluation["test"].query.with_single_labels()
        labels = [str(label) for label in split.labels]
        classes = sorted(set(labels))
        chosen = set(classes[:: max(len(classes) * len(domains) // MAX_EXAMPLES, 1)])
        seen: Counter[str] = Counter()
        for label, row in zip(labels, split.images, strict=True):
            seen[label] += 1
            # A class may be a slash, or any other character that no file can be called by.
            said = "".join(letter if letter.isalnum() or letter in "-_" else f"U+{ord(letter):04X}" for letter in label)
            folder, file = (queries, f"{name}-{said}.png") if label in chosen else (pictures / name, "")
            chosen.discard(label)
            (folder / (file or f"{said}-{seen[label]}.png")).write_bytes(encoded_bytes(row["image"]))


def main() -> None:
    """Writes the page, or says in one line why there is none."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path, help="folder of a run whose domains have a test split")
    parser.add_argument("--runtime", help="archive or folder of onnxruntime-web, instead of downloading it")
    arguments = parser.parse_args()

    run = arguments.run
    pictures, queries, embedded, index, page = (
        run / name for name in ("pictures", "queries", "embedded", "index", "page")
    )
    write_pictures(run, pictures, queries)
    encoder = Encoder.open(run)
    embed(SourceSpec(str(pictures), domain_from_folder=True), encoder, embedded, thumbnails=True, force=True)
    build_index([embedded], index, force=True)
    examples = sorted(queries.iterdir())[:MAX_EXAMPLES]
    options = PageOptions(f"Nearest images of {run.name}", examples, runtime=arguments.runtime)
    try:
        export_page(run, index, page, options, force=True, say=print)
    except (OSError, ImportError, ValueError) as error:
        print(f"no search page was written: {error}")
        return
    print(f"to see it: python3 -m http.server --bind 127.0.0.1 --directory {page}, then http://127.0.0.1:8000/")


if __name__ == "__main__":
    main()
