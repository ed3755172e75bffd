"""Scores a model on your own domains: `python examples/evaluate_model.py runs/demo/best shoes=data/shoes`."""

import argparse

from modeling_udon import Encoder, evaluate


def main() -> None:
    """Prints R@1 and mMP@5 of each domain, on one index of all domains and on an index of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="folder or Hub id of a student or of another vision encoder, or timm:NAME")
    parser.add_argument("domains", nargs="+", metavar="NAME=SOURCE", help="a folder, or an id on the Hub")
    parser.add_argument("--pooling", choices=("cls", "mean", "pooler"), help="feature of a model that is no student")
    parser.add_argument("--split", choices=("test", "validation"), default="test")
    arguments = parser.parse_args()

    encoder = Encoder.open(arguments.model, pooling=arguments.pooling)
    domains = dict(domain.split("=", 1) for domain in arguments.domains)
    measured = evaluate(encoder, domains, split=arguments.split)
    for row in measured.rows():
        print(f"{row['index']:<8}  {row['domain']:<12}  R@1 {row['R@1']:.1%}  mMP@5 {row['mMP@5']:.1%}")


if __name__ == "__main__":
    main()
