"""The packs and trainers of tests/trainer."""

from tests.trainer.conftest import arguments, make_pack, make_trainer, packs

__all__ = ["arguments", "make_pack", "make_trainer", "packs"]
