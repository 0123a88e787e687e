"""Train, or evaluate, one configuration: `python train.py +experiment=stage2`. See conf/ for what can be run."""

import sys

import hydra
from hydra.errors import InstantiationException
from omegaconf import DictConfig

from vllava.config import register_resolvers
from vllava.errors import UserError, stop
from vllava.run import run
from vllava.sources import check_spelling

register_resolvers()


@hydra.main(config_path="conf", config_name="train", version_base="1.3")
def main(cfg: DictConfig) -> None:
    try:
        run(cfg)
    except (UserError, InstantiationException) as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, UserError):
            cause = cause.__cause__  # Hydra wraps what a constructor raised
        if cause is None:
            raise
        stop(cause)


if __name__ == "__main__":
    try:
        check_spelling(sys.argv[1:])
    except UserError as error:
        stop(error)
    main()
