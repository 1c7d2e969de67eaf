"""New captions for a pool, written by a model: the step `recaption`. recaption.py has the flow of it."""

from ...lazy_names import lazy_names

_MODULES = {
    "RecaptionOptions": ".options",
    "recaption_pool": ".recaption",
}

__all__ = list(_MODULES)
__getattr__, __dir__ = lazy_names(__name__, _MODULES)
