"""Train, or evaluate, one configuration: `python train.py +experiment=stage2`. See conf/ for what can be run."""

import sys

import hydra
from hydra.errors import InstantiationException
from omegaconf import DictConfig

from vllava.config import check_command_line, register_resolvers, with_paths_quoted
from vllava.errors import stopping_at_mistakes
from vllava.run import run

register_resolvers()


@hydra.main(config_path="conf", config_name="train", version_base="1.3")
def main(cfg: DictConfig) -> None:
    with stopping_at_mistakes(InstantiationException):  # in which Hydra wraps what a constructor raised
        run(cfg)


if __name__ == "__main__":
    with stopping_at_mistakes():
        sys.argv[1:] = with_paths_quoted(sys.argv[1:])
        check_command_line(sys.argv[1:])
    main()
