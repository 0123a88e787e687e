"""Configurations as train.py sees them, and the messages that it ends with."""

import re

from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import open_dict
from shard_fixtures import ROOT

from vllava.config import register_resolvers

CONF = ROOT / "conf"
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))


def composed(*overrides, conf=CONF):
    """The configuration of a command line, as train.py sees it."""
    register_resolvers()
    with initialize_config_dir(str(conf), version_base="1.3"):
        cfg = compose("train", list(overrides), return_hydra_config=True)
    HydraConfig.instance().set_config(cfg)
    with open_dict(cfg):
        del cfg["hydra"]
    return cfg


def assert_one_paragraph(result, *words):
    """The run ended with a message of one line that holds the words, and nothing else."""
    code, printed = result
    assert code == 1, printed
    assert re.fullmatch(r"error: .+\n", printed), printed
    for word in words:
        assert word in printed
