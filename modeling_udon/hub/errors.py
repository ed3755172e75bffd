"""Explanations of the Hub's refusals, without secrets."""

from huggingface_hub import constants as hub_constants

_REFUSALS = {
    400: "the Hub does not take these files (400): the card's metadata or a name is not valid",
    401: "the Hub does not know you (401); log in with `hf auth login`, or set HF_TOKEN to a token with write access",
    402: "the Hub asks for a paid plan for this (402)",
    403: "your token may not write to {repo} (403); use one with write access to it",
    404: "the Hub has no {repo} for you (404); check the name, and your token's access",
    409: "{repo} was changed at the same time (409)",
    412: "{repo} was changed at the same time (412)",
    413: "a file is too large for the Hub (413)",
    429: "the Hub has had too many requests{tries} (429); wait some minutes",
}


def reason_of(error: BaseException, repo: str = "the repository", num_tries: int = 1) -> str:
    """What went wrong, without the text of the Hub or the client: it may hold a signed address, or repeat the token.

    Args:
        error: What the client raised.
        repo: What was to be reached.
        num_tries: How often a busy Hub was asked.
    """
    status = status_of(error)
    tries = f", also after {num_tries} tries" if num_tries > 1 else ""
    if status is not None:
        return _REFUSALS.get(status, f"the Hub failed ({status})").format(repo=repo, tries=tries)
    if hub_constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set; unset it"
    return f"the Hub at {hub_constants.ENDPOINT} cannot be reached ({type(error).__name__}); look at the network"


def status_of(error: BaseException) -> int | None:
    """Status of the answer that an error is about, if there was one."""
    # Some errors of the HTTP libraries have one, some `None`, some neither.
    response = getattr(error, "response", None)
    return None if response is None else int(response.status_code)
