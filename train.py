"""Train, or evaluate, one configuration: `python train.py +experiment=stage2`. See conf/ for what can be run."""

import sys

import hydra
from omegaconf import DictConfig

from vllava.config import register_resolvers
from vllava.errors import UserError
from vllava.run import run

register_resolvers()


@hydra.main(config_path="conf", config_name="train", version_base="1.3")
def main(cfg: DictConfig) -> None:
    try:
        run(cfg)
    except UserError as error:
        sys.exit(f"error: {error.paragraph}")


if __name__ == "__main__":
    main()
