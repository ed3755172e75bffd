"""Trains one embedding for your own domains: `python examples/train_own_domains.py shoes=data/shoes bags=org/bags`."""

import argparse

from modeling_udon import load_config, train


def main() -> None:
    """Trains on the domains of the command line and prints the scores of the test split."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("domains", nargs="+", metavar="NAME=SOURCE", help="a folder, or an id on the Hub")
    parser.add_argument("--config", default="configs/small.yaml", help="all other settings")
    parser.add_argument("--name", default="own", help="name of the run")
    arguments = parser.parse_args()

    config = load_config(arguments.config, ["--name", arguments.name], domains=arguments.domains)
    tested = train(config)
    if tested is None:
        print("no domain has a test split")
        return
    for domain, scores in tested.results["splits"]["test"]["merged"]["domains"].items():
        print(f"{domain}: R@1 {scores['R@1']:.1%}")
    print(f"the student is in {config.run_dir / 'best'}")


if __name__ == "__main__":
    main()
