"""Proxies of the environment, which cannot reach servers on this machine."""

import os

_THIS_MACHINE = ("localhost", "127.0.0.1", "::1")


def go_past_proxies(*hosts: str) -> None:
    """Lets this process and its children reach this machine without the proxies that the environment names.

    Args:
        hosts: Further names or addresses of this machine.
    """
    if not any(
        name.lower().endswith("_proxy") and name.lower() != "no_proxy" and os.environ[name] for name in os.environ
    ):
        return
    # Of the two spellings, the libraries read the lower one where both are there.
    known = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    direct = [name.strip() for name in known.split(",") if name.strip()]
    if "*" not in direct:
        os.environ["no_proxy"] = ",".join(dict.fromkeys([*direct, *_THIS_MACHINE, *hosts]))
