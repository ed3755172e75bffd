"""`udon serve`."""

from collections.abc import Sequence
from importlib.util import find_spec

from modeling_udon.cli.models import open_for_index, open_index, open_model
from modeling_udon.cli.options import Commit, Decoders, File, Folder, Name, Natural, Port, Positive
from modeling_udon.cli.terminal import say

_NEEDED = ("fastapi", "uvicorn", "prometheus_client")


def serve(
    *,
    model: str,
    index: Folder | None = None,
    revision: Commit | None = None,
    trust_remote_code: bool = False,
    name: Name | None = None,
    host: str = "127.0.0.1",
    port: Port = 8000,
    token_file: File | None = None,
    token_for_all: bool = False,
    allow_hosts: Sequence[Name] = (),
    max_batch: Positive = 32,
    max_wait_ms: Natural = 5,
    max_waiting: Positive = 512,
    max_items: Positive = 128,
    max_megabytes: Positive = 20,
    max_megapixels: Positive = 50,
    decode_seconds: Positive = 10,
    request_seconds: Positive = 60,
    num_workers: Decoders | None = None,
) -> None:
    """Serve embeddings and search over HTTP, for clients of OpenAI and for curl.

    Args:
        model: Folder of a model, or its id on the Hub.
        index: Folder that `udon index` wrote with it; lancedb://FOLDER or hf://datasets/OWNER/NAME are only read.
        revision: Commit, tag or branch of the model on the Hub.
        trust_remote_code: Run the code beside a model that is not a UDON model.
        name: What clients call the model; by default its Hub id, or the last name of its folder.
        host: Address to listen on, 0.0.0.0 for all.
        port: Port to listen on.
        token_file: File with the token for changes of the index.
        token_for_all: Ask for the token in every request but those for /health.
        allow_hosts: Hosts that images are fetched from by address; by default none is.
        max_batch: Images of one forward pass.
        max_wait_ms: Milliseconds that an image waits for others to share its forward pass.
        max_waiting: Images in work or waiting; more are answered 429.
        max_items: Images of one request.
        max_megabytes: Size of an image file.
        max_megapixels: Pixels of an image.
        decode_seconds: Time to decode an image.
        request_seconds: Time to answer a request.
        num_workers: Processes that decode; by default half of the cores, at least 2.

    Example:
        udon serve --model runs/demo/best --index photos-index --token-file token.txt
    """
    if missing := [package for package in _NEEDED if find_spec(package) is None]:
        raise ImportError(f'the service needs {missing[0]}, which is missing: pip install "modeling-udon[serve]"')
    if token_for_all and token_file is None:
        raise ValueError("--token-for-all must come with --token-file, which holds the token")
    if wrong := next((name for name in allow_hosts if set("/:*@") & set(name)), None):
        raise ValueError(f"--allow-hosts must be names of hosts alone, such as images.example.org. Got {wrong!r}.")
    from modeling_udon.serving.gate import Access
    from modeling_udon.serving.limits import Limits
    from modeling_udon.serving.server import listen, make_service, read_token, run

    limits = Limits(
        max_body_bytes=max_megabytes * 2**20 * 8 // 5,
        max_image_bytes=max_megabytes * 2**20,
        max_pixels=max_megapixels * 10**6,
        max_items=min(max_items, max_waiting),
        max_waiting=max_waiting,
        decode_seconds=decode_seconds,
        request_seconds=request_seconds,
        max_batch=max_batch,
        max_wait=max_wait_ms / 1000,
        **({} if num_workers is None else {"num_decoders": num_workers}),
    )
    token = None if token_file is None else read_token(token_file)
    with listen(host, port) as opened:
        searched = None if index is None else open_index(index)
        # Queries are pooled as the images of the index were.
        encoder = (
            open_model(model, revision, trust_remote_code)
            if searched is None
            else open_for_index(searched, model, revision, trust_remote_code)
        )
        service = make_service(encoder, searched, name, limits, allow_hosts)
        run(service, Access(token, token_for_all), opened, say)
