"""`udon <verb>`: parses the command line; each verb's work is done by the module that its function imports."""

import argparse
import json
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from modeling_udon.text import printable

INDEX_KINDS = ("auto", "flat", "ivf", "hnsw", "pq", "ivfpq", "sq8", "binary")
CONVERT_FORMATS = ("augreg", "clip-npy", "flax")
EXPORT_FORMATS = ("sentence-transformers", "native", "onnx")
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
    _add_prepare(verbs)
    _add_embed(verbs)
    _add_index(verbs)
    _add_search(verbs)
    _add_evaluate(verbs)
    _add_report(verbs)
    _add_app(verbs)
    _add_push_space(verbs)
    _add_export(verbs)
    _add_convert(verbs)
    _add_push(verbs)
    return parser


def _add_prepare(verbs: Any) -> None:
    prepare = verbs.add_parser("prepare", help="turn image files into domains to train on", allow_abbrev=False)
    kinds = prepare.add_subparsers(dest="kind", metavar="KIND", required=True)
    uned = _add_verb(
        kinds,
        "uned",
        "prepare domains of UnED from its info files",
        "udon prepare uned --info-files info_files --images images --out uned",
        _prepare_uned,
    )
    uned.add_argument("--info-files", required=True, metavar="FOLDER", help="holds DOMAIN/SPLIT.json")
    uned.add_argument("--images", required=True, metavar="FOLDER", help="that the paths in them start from")
    uned.add_argument("--domains", nargs="+", default=[], metavar="NAME", help="which of them; default: all")
    _add_allow_outside(uned, "the info files name outside of --images")
    own = {
        "folder": (
            "prepare a domain from a folder with a folder a class",
            "udon prepare folder photos --out data/photos",
        ),
        "csv": ("prepare a domain from a table, CSV or Parquet", "udon prepare csv photos.csv --out data/photos"),
        "hub": ("prepare a domain from a data set", "udon prepare hub org/photos --out data/photos"),
    }
    for kind, (what, example) in own.items():
        parser = _add_verb(kinds, kind, what, example, _prepare_own)
        source = {"folder": "the folder", "csv": "the table", "hub": "its id on the Hub, or its folder"}
        parser.add_argument("source", metavar="SOURCE", help=source[kind])
        parser.add_argument("--name", help="of the domain; default: that of --out")
        parser.add_argument("--seed", type=_natural, default=0, metavar="N", help="of the split; default: 0")
        parser.add_argument(
            "--validation", type=_fraction, default=0.1, metavar="R", help="share of classes; default: 0.1"
        )
        parser.add_argument("--test", type=_fraction, default=0.2, metavar="R", help="share of classes; default: 0.2")
        if kind == "csv":
            parser.add_argument("--images", metavar="FOLDER", help="that paths start from; default: the table's folder")
            _add_allow_outside(parser, "the table names outside of --images")
        if kind == "hub":
            parser.add_argument("--config", metavar="NAME", help="configuration of the data set")
            parser.add_argument("--revision", help="commit, tag or branch on the Hub")
        for column in {"folder": (), "csv": ("path", "label", "split"), "hub": ("image", "label")}[kind]:
            parser.add_argument(f"--{column}-column", default=column, metavar="COLUMN", help=f"default: {column}")
    for parser in kinds.choices.values():
        parser.add_argument("--out", required=True, metavar="FOLDER", help="where it goes")
        parser.add_argument("--size", type=_positive, metavar="N", help="shrink to this shorter side, encode anew")
        parser.add_argument("--shard-size", type=_positive, default=5000, metavar="N", help="images; default: 5000")
        parser.add_argument("--num-workers", type=_natural, default=2, metavar="N", help="that decode; default: 2")


def _prepare_uned(arguments: argparse.Namespace) -> None:
    from modeling_udon.prepare.prepare import prepare_uned
    from modeling_udon.prepare.shards import PrepareOptions

    prepare_uned(
        Path(arguments.info_files),
        Path(arguments.images),
        Path(arguments.out),
        PrepareOptions(**_chosen(arguments, "size", "shard_size", "num_workers")),
        arguments.domains,
        sys.stderr.isatty(),
        _say,
        arguments.allow_outside,
    )


def _prepare_own(arguments: argparse.Namespace) -> None:
    from modeling_udon.prepare.prepare import OwnData, prepare_own
    from modeling_udon.prepare.shards import PrepareOptions

    of_kind = {
        "csv": ["images", "path_column", "label_column", "split_column", "allow_outside"],
        "hub": ["config", "revision", "image_column", "label_column"],
    }
    values = _chosen(arguments, "seed", "validation", "test", *of_kind.get(arguments.kind, []))
    if values.get("images") is not None:
        values["images"] = Path(values["images"])
    data = OwnData(arguments.source, arguments.kind, arguments.name or Path(arguments.out).name, **values)
    options = PrepareOptions(**_chosen(arguments, "size", "shard_size", "num_workers"))
    prepare_own(data, Path(arguments.out), options, sys.stderr.isatty(), _say)


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
    _add_allow_outside(parser, "a list file names outside of its own folder")
    parser.add_argument("--batch-size", type=_positive, default=64, metavar="N", help="default: 64")
    parser.add_argument(
        "--num-workers", type=_natural, metavar="N", help="processes that decode; default: a core each but one"
    )
    parser.add_argument("--mixed-precision", choices=PRECISIONS, default="no", help="default: no")
    parser.add_argument("--shard-size", type=_positive, default=10_000, metavar="N", help="images; default: 10000")
    parser.add_argument("--force", action="store_true", help="drop the embeddings in FOLDER and start anew")


def _embed(arguments: argparse.Namespace) -> None:
    from modeling_udon.search.embed import EmbedOptions, embed_source
    from modeling_udon.search.sources import SourceSpec

    what = ("source", "allow_outside", "domain", "domain_from_folder")
    of_data = ("name", "split", "data_revision", "image_column", "columns")
    how = ("thumbnails", "batch_size", "num_workers", "mixed_precision", "shard_size")
    embed_source(
        SourceSpec(**_chosen(arguments, *what, *of_data)),
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
    from modeling_udon.search.index import build_index

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
    from modeling_udon.search.query import format_results, search_images
    from modeling_udon.search.results_page import check_page, write_page

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
    _say(json.dumps(results.to_json(), indent=2) if arguments.json else format_results(results))
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
    from modeling_udon.config_file import load_config
    from modeling_udon.evaluation.evaluate import EvaluateOptions, evaluate

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
    from modeling_udon.evaluation.evaluate import EvaluateOptions, evaluate

    work = _chosen(arguments, "split", "batch_size", "num_workers")
    evaluate(EvaluateOptions(run=arguments.run_folder, report=True, **work), say=_say)


def _add_app(verbs: Any) -> None:
    parser = _add_verb(
        verbs,
        "app",
        "serve a page on which one drops a picture and sees the nearest images",
        "udon app --model runs/demo/best --index photos-index --examples photos",
        _app,
    )
    _add_sides(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on, 0.0.0.0 for all; default: 127.0.0.1")
    parser.add_argument("--port", type=_positive, default=7860, metavar="N", help="default: 7860")
    parser.add_argument("--share", action="store_true", help="open a public link to this machine")
    parser.add_argument(
        "--requests-per-minute",
        type=_natural,
        default=120,
        metavar="N",
        help="uploads and searches of one address, 0 for any number; default: 120",
    )


def _app(arguments: argparse.Namespace) -> None:
    _check_sides(arguments)
    from modeling_udon.search.app import find_examples, make_page, open_side, start

    examples = [] if arguments.examples is None else find_examples(arguments.examples)
    sides = [open_side(arguments.index, lambda: _model(arguments))]
    if arguments.model2 is not None:
        second = argparse.Namespace(**vars(arguments) | {"model": arguments.model2, "revision": arguments.revision2})
        sides.append(open_side(arguments.index2, lambda: _model(second)))
    page = make_page(sides, examples)
    address = start(page, **_chosen(arguments, "host", "port", "share", "requests_per_minute"))
    _say(f"the page is at {address}, until Ctrl+C")
    page.block_thread()


def _add_push_space(verbs: Any) -> None:
    parser = _add_verb(
        verbs,
        "push-space",
        "publish the page of udon app as a Space on the Hub, in one commit",
        "udon push-space --repo me/nearest --model runs/demo/best --index photos-index --examples photos",
        _push_space,
    )
    parser.add_argument("--repo", required=True, metavar="OWNER/NAME", help="the Space, made if need be")
    _add_sides(parser)
    parser.add_argument("--private", action="store_true", help="it must be private")
    parser.add_argument("--out", metavar="FOLDER", help="folder that the Space is made in; default: NAME-space")
    parser.add_argument("--force", action="store_true", help="replace the Space in --out; NAME-space always is")
    parser.add_argument("--dry-run", action="store_true", help="make the folder, list files and sizes, upload nothing")


def _push_space(arguments: argparse.Namespace) -> None:
    _check_sides(arguments)
    from huggingface_hub.utils import disable_progress_bars
    from transformers.utils import logging

    from modeling_udon.hub.space import SpaceSide, check_repo, list_files, make_space, push_space
    from modeling_udon.search.app import find_examples

    check_repo(arguments.repo)
    if not sys.stderr.isatty():
        disable_progress_bars()
        logging.disable_progress_bar()
    name = arguments.repo.rpartition("/")[2]
    folder = arguments.out or f"{name}-space"
    sides = [SpaceSide(arguments.model, arguments.index, arguments.revision)]
    if arguments.model2 is not None:
        sides.append(SpaceSide(arguments.model2, arguments.index2, arguments.revision2))
    examples = [] if arguments.examples is None else find_examples(arguments.examples)
    force = arguments.force or arguments.out is None
    make_space(sides, folder, name, examples, arguments.trust_remote_code, say=_warn, force=force)
    _say(list_files(folder))
    if not arguments.dry_run:
        _say(f"the Space is at {push_space(folder, arguments.repo, arguments.private)}")


def _add_sides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--index", required=True, metavar="FOLDER", help="folder that `udon index` wrote")
    _add_model(parser)
    parser.add_argument("--examples", metavar="FOLDER", help="pictures to click on, at most 12")
    second = parser.add_argument_group("to compare two models side by side")
    second.add_argument("--model2", metavar="MODEL", help="folder of the second model, or its id on the Hub")
    second.add_argument("--index2", metavar="FOLDER", help="its index")
    second.add_argument("--revision2", metavar="REVISION", help="its commit, tag or branch on the Hub")


def _check_sides(arguments: argparse.Namespace) -> None:
    if (arguments.model2 is None) != (arguments.index2 is None):
        raise ValueError("--model2 and --index2 must be given together, a model with the index that was made with it")
    if arguments.revision2 is not None and arguments.model2 is None:
        raise ValueError("--revision2 must be of --model2, which is not given")
    if find_spec("gradio") is None:
        raise ImportError('the page needs gradio, which is missing: pip install "modeling-udon[demo]"')


def _add_export(verbs: Any) -> None:
    parser = _add_verb(
        verbs,
        "export",
        "write a student in a form that needs no remote code",
        "udon export runs/demo --format sentence-transformers --out demo-modules",
        _export,
    )
    parser.add_argument("model", metavar="MODEL", help="folder of a student or of a run, or id on the Hub")
    parser.add_argument("--format", choices=EXPORT_FORMATS, required=True, help="exact, or refused with the reason")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="folder of the result")
    parser.add_argument("--revision", help="commit, tag or branch of the model on the Hub")
    parser.add_argument("--force", action="store_true", help="replace the model in FOLDER")
    int8 = parser.add_argument_group("of --format onnx")
    int8.add_argument("--int8", action="store_true", help="weights in int8; what that costs in R@1 is printed")
    int8.add_argument(
        "--config", metavar="FILE", help="YAML file of a run, which names the domains to measure on; for a run its own"
    )
    int8.add_argument("--split", choices=("test", "validation"), default="validation", help="default: validation")
    int8.add_argument("--batch-size", type=_positive, default=64, metavar="N", help="default: 64")
    int8.add_argument("--num-workers", type=_natural, default=2, metavar="N", help="processes that decode; default: 2")


def _export(arguments: argparse.Namespace) -> None:
    from modeling_udon.config_file import load_config
    from modeling_udon.hub.export import ExportOptions, export_model

    _hide_bars_in_logs()
    names = ("model", "format", "out", "revision", "int8", "split", "batch_size", "num_workers", "force")
    config = None if arguments.config is None else load_config(arguments.config)
    specs, seed = (None, 0) if config is None else (config.domains, config.seed)
    export_model(ExportOptions(**_chosen(arguments, *names)), specs, seed, say=_say)


def _add_convert(verbs: Any) -> None:
    parser = _add_verb(
        verbs,
        "convert",
        "bring weights of the original's files into the format of transformers",
        "udon convert checkpoint_100 --format flax --out udon-vitb --inputs images.npy --outputs embeddings.npy",
        _convert,
    )
    parser.add_argument("file", metavar="FILE", help="file of weights")
    parser.add_argument(
        "--format",
        choices=CONVERT_FORMATS,
        required=True,
        help="augreg: a ViT, .npz; clip-npy: CLIP, .npy; flax: a trained UDON checkpoint, msgpack",
    )
    parser.add_argument("--out", required=True, metavar="FOLDER", help="folder of the model")
    parser.add_argument(
        "--image-size", type=_positive, metavar="N", help="interpolate the position embeddings for images of N pixels"
    )
    parser.add_argument("--inputs", metavar="NPY", help="images that the original was given: (num, side, side, 3)")
    parser.add_argument("--outputs", metavar="NPY", help="what it made of them; the largest difference is printed")
    parser.add_argument("--force", action="store_true", help="replace the model in FOLDER")
    flax = parser.add_argument_group("of --format flax")
    flax.add_argument("--head", metavar="NAME", help="the student's head, if it has another name than UDON's")
    flax.add_argument("--keep-teachers", action="store_true", help="keep the teachers' heads")
    flax.add_argument("--domains", nargs="+", default=[], metavar="NAME", help="what they teach, in order")


def _convert(arguments: argparse.Namespace) -> None:
    from modeling_udon.hub.convert import ConvertOptions, convert

    _hide_bars_in_logs()
    names = ("file", "format", "out", "image_size", "inputs", "outputs", "keep_teachers", "force")
    head = {} if arguments.head is None else {"head": arguments.head}
    convert(ConvertOptions(domains=tuple(arguments.domains), **_chosen(arguments, *names), **head), say=_say)


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


def _add_allow_outside(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--allow-outside", action="store_true", help=f"read what {what}")


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="folder of a model, or its id on the Hub")
    parser.add_argument("--revision", help="commit, tag or branch of the model on the Hub")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run the code that lies beside a model that is not UDON's"
    )


def _model(arguments: argparse.Namespace) -> Any:
    from modeling_udon.encoder import load_embedding_model

    _hide_bars_in_logs()
    return load_embedding_model(arguments.model, arguments.revision, arguments.trust_remote_code)


def _hide_bars_in_logs() -> None:
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()


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
    print(_safe(text), flush=True)


def _warn(text: str) -> None:
    print(_safe(text), file=sys.stderr, flush=True)


def _safe(text: str) -> str:
    # What a file's name or a library put into a line must not steer the terminal.
    return "\n".join(map(printable, text.split("\n")))


def _complain(verb: str, error: object, code: int) -> int:
    _warn(f"udon {verb}: error: {' '.join(str(error).split())}")
    return code
