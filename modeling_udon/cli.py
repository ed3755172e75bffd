"""`udon <verb>`: parses the command line; each verb's work is done by the module that its function imports."""

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

INDEX_KINDS = ("auto", "flat", "ivf", "hnsw", "pq", "ivfpq", "sq8", "binary")
PRECISIONS = ("no", "fp16", "bf16")


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb; returns the exit code: 2 for a wrong argument, 1 for what the system refused, 0 otherwise."""
    arguments = make_parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except ValueError as error:
        return _complain(arguments.verb, error, 2)
    except (OSError, ImportError) as error:
        return _complain(arguments.verb, error, 1)
    except KeyboardInterrupt:
        return _complain(arguments.verb, "interrupted", 130)
    return 0


def make_parser() -> argparse.ArgumentParser:
    """The parser of all verbs."""
    parser = _Parser(prog="udon", description="One image embedding for many domains.", allow_abbrev=False)
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    _add_embed(verbs)
    _add_index(verbs)
    _add_search(verbs)
    _add_evaluate(verbs)
    _add_report(verbs)
    _add_push(verbs)
    return parser


def _add_embed(verbs: Any) -> None:
    parser = _add_verb(
        verbs,
        "embed",
        "turn images into embeddings, in Parquet shards",
        "udon embed photos/ --model runs/demo/best --out photos-embedded",
        _embed,
    )
    parser.add_argument(
        "source", metavar="SOURCE", help="folder, list file, image, Parquet file or folder, Hub data set, or demo:NAME"
    )
    _add_model(parser)
    parser.add_argument("--out", required=True, metavar="FOLDER", help="folder of the embeddings")
    data = parser.add_argument_group("of a data set")
    data.add_argument("--name", help="its configuration")
    data.add_argument("--split", help="its split; by default the only one")
    data.add_argument("--data-revision", metavar="REVISION", help="its commit, tag or branch on the Hub")
    data.add_argument("--image-column", metavar="COLUMN", help="its column of images; by default the only one")
    data.add_argument(
        "--columns", nargs="+", default=[], metavar="COLUMN", help="columns to keep beside the embeddings"
    )
    domains = parser.add_mutually_exclusive_group()
    domains.add_argument("--domain", help="name of the domain that all images are of, kept as column `domain`")
    domains.add_argument(
        "--domain-from-folder", action="store_true", help="the first folder below SOURCE names an image's domain"
    )
    parser.add_argument(
        "--thumbnails", action="store_true", help="keep small JPEGs, so that search can show images from anywhere"
    )
    parser.add_argument("--batch-size", type=_positive, default=64, metavar="N", help="default: 64")
    parser.add_argument(
        "--num-workers", type=_natural, metavar="N", help="processes that decode; default: a core each but one"
    )
    parser.add_argument("--mixed-precision", choices=PRECISIONS, default="no", help="default: no")
    parser.add_argument("--shard-size", type=_positive, default=10_000, metavar="N", help="images; default: 10000")
    parser.add_argument("--force", action="store_true", help="drop the embeddings in FOLDER and start anew")


def _embed(arguments: argparse.Namespace) -> None:
    from modeling_udon.retrieval.embed_files import EmbedOptions, embed_source
    from modeling_udon.retrieval.sources import SourceSpec

    what = ("source", "name", "split", "data_revision", "image_column", "columns", "domain", "domain_from_folder")
    how = ("thumbnails", "batch_size", "num_workers", "mixed_precision", "shard_size")
    embed_source(
        SourceSpec(**_chosen(arguments, *what)),
        _model(arguments),
        arguments.out,
        EmbedOptions(**_chosen(arguments, *how)),
        force=arguments.force,
        say=_say,
    )


def _add_index(verbs: Any) -> None:
    parser = _add_verb(
        verbs,
        "index",
        "make embeddings searchable, and measure how exact the search is",
        "udon index photos-embedded --out photos-index",
        _index,
    )
    parser.add_argument("embeddings", nargs="+", metavar="EMBEDDINGS", help="folders that `udon embed` wrote")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="folder of the index")
    parser.add_argument("--kind", choices=INDEX_KINDS, default="auto", help="default: by the number of images")
    parser.add_argument(
        "--recall", type=_fraction, default=0.95, metavar="R", help="recall@10 that ivf and hnsw aim at; default: 0.95"
    )
    parser.add_argument("--force", action="store_true", help="replace the index in FOLDER")


def _index(arguments: argparse.Namespace) -> None:
    from modeling_udon.retrieval.ann import build_index

    build_index(
        arguments.embeddings,
        arguments.out,
        kind=arguments.kind,
        target_recall=arguments.recall,
        force=arguments.force,
        say=_say,
    )


def _add_search(verbs: Any) -> None:
    parser = _add_verb(
        verbs,
        "search",
        "find the images of an index that are most like a given one",
        "udon search photo.jpg --index photos-index --model runs/demo/best -k 5 --html neighbours.html",
        _search,
    )
    parser.add_argument("queries", nargs="+", metavar="QUERY", help="image, or folder of images")
    parser.add_argument("--index", required=True, metavar="FOLDER", help="folder that `udon index` wrote")
    _add_model(parser)
    parser.add_argument("-k", type=_positive, default=5, metavar="K", help="neighbours of each query; default: 5")
    parser.add_argument("--domain", help="look among the images of this domain only")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--html", metavar="FILE", help="write a page with thumbnails")
    parser.add_argument("--batch-size", type=_positive, default=32, metavar="N", help="default: 32")
    parser.add_argument("--force", action="store_true", help="replace the page in FILE")


def _search(arguments: argparse.Namespace) -> None:
    from modeling_udon.retrieval.search import format_results, search_images
    from modeling_udon.retrieval.search_page import check_page, write_page

    if arguments.html is not None:
        check_page(arguments.html, arguments.force)
    results = search_images(
        arguments.queries,
        arguments.index,
        lambda: _model(arguments),
        k=arguments.k,
        domain=arguments.domain,
        batch_size=arguments.batch_size,
        warn=_warn,
    )
    print(json.dumps(results.to_json(), indent=2) if arguments.json else format_results(results))
    if arguments.html is not None:
        write_page(arguments.html, results)
        _warn(f"wrote {arguments.html}")


def _add_evaluate(verbs: Any) -> None:
    parser = _add_verb(
        verbs,
        "evaluate",
        "measure retrieval on the domains of a config",
        "udon evaluate --run runs/demo --metrics R@5 mAP@R --report",
        _evaluate,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--run", dest="run_folder", metavar="FOLDER", help="folder of a run: best student and teachers")
    what.add_argument(
        "--model", help="folder or Hub id of a UDON model or another vision encoder, timm:NAME, or raw-pixels"
    )
    what.add_argument("--embeddings", metavar="FOLDER", help="embeddings in FOLDER/DOMAIN/SPLIT, as udon embed writes")
    parser.add_argument(
        "--config", metavar="FILE", help="YAML file of a run, which names the domains; for --run by default its own"
    )
    parser.add_argument("--split", choices=("test", "validation"), default="test", help="default: test")
    model = parser.add_argument_group("of a model")
    model.add_argument("--pooling", choices=("cls", "mean", "pooler"), help="feature of a model that is not UDON's")
    model.add_argument("--image-size", type=_positive, metavar="N", help="in place of what its image processor says")
    model.add_argument("--revision", help="its commit, tag or branch on the Hub")
    model.add_argument("--trust-remote-code", action="store_true", help="run the code that lies beside it")
    model.add_argument("--batch-size", type=_positive, default=64, metavar="N", help="default: 64")
    model.add_argument("--num-workers", type=_natural, default=2, metavar="N", help="processes that decode; default: 2")
    model.add_argument("--mixed-precision", choices=PRECISIONS, default="no", help="default: no")
    study = parser.add_argument_group("what to measure")
    study.add_argument(
        "--metrics", nargs="+", default=[], metavar="METRIC", help="R@k, mMP@k, mAP@R beside R@1 and mMP@5"
    )
    study.add_argument("--pca", nargs="+", type=_positive, default=[], metavar="DIM", help="also reduced to so many")
    study.add_argument("--quality-per-byte", action="store_true", help="dimensions x float32, int8, binary, pq")
    study.add_argument("--leaks", choices=("bytes", "pixels"), help="look for images of the split in training")
    study.add_argument(
        "--bootstrap", type=_positive, default=1000, metavar="N", help="samples of the 95 %% intervals; default: 1000"
    )
    study.add_argument("--seed", type=_natural, default=0, metavar="N", help="of the samples; default: 0")
    parser.add_argument(
        "--calibrate", action="store_true", help='find the threshold for "not in the index" on the validation split'
    )
    parser.add_argument(
        "--false-accept-rate", type=_fraction, default=0.01, metavar="R", help="of --calibrate; default: 0.01"
    )
    parser.add_argument("--output", metavar="FOLDER", help="where results.json goes; for --run by default its folder")
    parser.add_argument("--report", action="store_true", help="write report.html beside results.json")


def _evaluate(arguments: argparse.Namespace) -> None:
    from modeling_udon.retrieval.evaluate_verb import EvaluateOptions, evaluate
    from modeling_udon.training.config import load_config

    names = ("model", "embeddings", "split", "pooling", "image_size", "revision", "trust_remote_code")
    work = ("batch_size", "num_workers", "mixed_precision", "metrics", "pca", "quality_per_byte", "leaks", "bootstrap")
    ends = ("seed", "calibrate", "false_accept_rate", "output", "report")
    options = EvaluateOptions(run=arguments.run_folder, **_chosen(arguments, *names, *work, *ends))
    config = None if arguments.config is None else load_config(arguments.config)
    evaluate(options, None if config is None else config.domains, 0 if config is None else config.seed, say=_say)


def _add_report(verbs: Any) -> None:
    parser = _add_verb(
        verbs, "report", "write a run's report.html: tables, curves, galleries", "udon report runs/demo", _report
    )
    parser.add_argument("run_folder", metavar="RUN", help="folder of a run")
    parser.add_argument("--split", choices=("test", "validation"), default="test", help="default: test")
    parser.add_argument("--batch-size", type=_positive, default=64, metavar="N", help="default: 64")
    parser.add_argument("--num-workers", type=_natural, default=2, metavar="N", help="that decode; default: 2")


def _report(arguments: argparse.Namespace) -> None:
    from modeling_udon.retrieval.evaluate_verb import EvaluateOptions, evaluate

    work = _chosen(arguments, "split", "batch_size", "num_workers")
    evaluate(EvaluateOptions(run=arguments.run_folder, report=True, **work), say=_say)


def _add_push(verbs: Any) -> None:
    parser = _add_verb(
        verbs, "push", "publish a run's student on the Hub, in one commit", "udon push runs/demo --repo me/demo", _push
    )
    parser.add_argument("run_folder", metavar="RUN", help="folder of a run, or of a student")
    parser.add_argument("--repo", required=True, metavar="OWNER/NAME", help="repository, made if need be")
    parser.add_argument("--private", action="store_true", help="it must be private")
    parser.add_argument("--revision", metavar="BRANCH", help="branch, made if need be; default: main")
    parser.add_argument("--tag", help="of the commit, which the card pins; default: made of the files' contents")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request instead")
    parser.add_argument("--gallery", action="store_true", help="show small pictures of the test split in the card")
    parser.add_argument("--license", default="apache-2.0", metavar="ID", help="of the model; default: apache-2.0")
    parser.add_argument("--dry-run", action="store_true", help="list files and sizes, and do nothing")


def _push(arguments: argparse.Namespace) -> None:
    from huggingface_hub.utils import disable_progress_bars
    from transformers.utils import logging

    from modeling_udon.hub.push import PushOptions, push

    logging.disable_progress_bar()
    if not sys.stderr.isatty():
        disable_progress_bars()
    names = ("repo", "private", "revision", "tag", "create_pr", "gallery", "license")
    options = PushOptions(**_chosen(arguments, *names))
    push(arguments.run_folder, options, dry_run=arguments.dry_run, say=_say)


def _add_verb(verbs: Any, name: str, what: str, example: str, run: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(
        name,
        help=what,
        description=f"{what[0].upper()}{what[1:]}.",
        epilog=f"example: {example}",
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="folder of a model, or its id on the Hub")
    parser.add_argument("--revision", help="commit, tag or branch of the model on the Hub")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run the code that lies beside a model that is not UDON's"
    )


def _model(arguments: argparse.Namespace) -> Any:
    from transformers.utils import logging

    from modeling_udon.retrieval.models import load_embedding_model

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    return load_embedding_model(arguments.model, arguments.revision, arguments.trust_remote_code)


def _chosen(arguments: argparse.Namespace, *names: str) -> dict[str, Any]:
    return {name: getattr(arguments, name) for name in names}


def _positive(text: str) -> int:
    return _number(text, 1)


def _natural(text: str) -> int:
    return _number(text, 0)


def _number(text: str, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}, got {text!r}")
    return int(text)


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be a number above 0 and at most 1, got {text!r}")
    return value


def _say(text: str) -> None:
    print(text, flush=True)


def _warn(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _complain(verb: str, error: object, code: int) -> int:
    # What a file's name or a library put into the message must neither break the line nor steer the terminal.
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in " ".join(str(error).split()))
    _warn(f"udon {verb}: error: {line}")
    return code


if __name__ == "__main__":
    sys.exit(main())
