"""What a model family tells the pipeline: found by the class of a processor, or by a config's `model_type`.

    interface.py      the two protocols that a family implements, and nothing else of it is special anywhere
    open_qwen2vl.py, open_qwen2vl_model.py   the first family, data and model side
    qwen_vl/          Qwen2-VL, Qwen2.5-VL and Qwen3-VL

Families are imported when they are first asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .interface import DocumentProcessor, PackedModel

_OURS, _QWEN = "open_qwen2vl.families.open_qwen2vl", "open_qwen2vl.families.qwen_vl"
# By the processor's class and by the config's model_type: a class, or the module and the name of one.
_DOCUMENTS: dict[str, Any] = {
    "OpenQwen2VLProcessor": (_OURS, "OpenQwen2VLDocuments"),
    "PreTrainedTokenizerBase": (_OURS, "OpenQwen2VLDocuments"),
    **dict.fromkeys(
        ("Qwen2VLProcessor", "Qwen2_5_VLProcessor", "Qwen3VLProcessor"), (f"{_QWEN}.processing", "QwenVLDocuments")
    ),
}
_MODELS: dict[str, Any] = {
    "open_qwen2vl": (f"{_OURS}_model", "OpenQwen2VLPackedModel"),
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl"), (f"{_QWEN}.model", "QwenVL")),
}


def document_processor(
    processor: Any, vision: dict[str, Any] | None = None, chat_template: str | None = None, **plan_options: Any
) -> "DocumentProcessor":
    """The data side of the family that a processor belongs to.

    Args:
        processor (`ProcessorMixin` or `PreTrainedTokenizerBase`): a family's processor; a tokenizer is taken for
            Open-Qwen2VL's.
        vision (`dict`, *optional*): a plan's, whose options it follows and whose other values it must have.
        chat_template (`str`, *optional*): name of one of the processor's templates.
        plan_options: values of the family's `plan_options`, where there is no plan yet.

    Returns:
        [`DocumentProcessor`].

    Raises:
        ValueError: for a processor of no known family, an option that its family does not have, or one whose values
            are not those of `vision`.
    """
    # By name, along the bases: a subclass belongs to its family, and no family is imported to find out.
    found = next((_DOCUMENTS[base.__name__] for base in type(processor).__mro__ if base.__name__ in _DOCUMENTS), None)
    if found is None:
        known = ", ".join(name for name in _DOCUMENTS if name != "PreTrainedTokenizerBase")
        raise ValueError(f"{type(processor).__name__} belongs to no known model family; known are {known}")
    family = _load(found)
    chosen = {name: value for name, value in plan_options.items() if value is not None}
    unknown = sorted(chosen.keys() - set(family.plan_options))
    if unknown:
        owner = "Open-Qwen2VL" if found == _DOCUMENTS["PreTrainedTokenizerBase"] else type(processor).__name__
        raise ValueError(f"{unknown[0]} is no option of {owner}; it has {', '.join(family.plan_options)}")
    if vision is not None:
        chosen |= {name: vision[name] for name in family.plan_options if name in vision}
    documents = family(processor, chat_template=chat_template, **chosen)
    if vision is not None and documents.fingerprint() != vision:
        raise ValueError(difference(vision, documents.fingerprint()))
    return documents


def packed_model(config: Any) -> "PackedModel":
    """The model side of the family that a config (`PreTrainedConfig`) belongs to, by its `model_type`."""
    model_type = config.model_type
    if model_type not in _MODELS:
        raise ValueError(f"{model_type} is no known model family; known are {', '.join(_MODELS)}")
    return _load(_MODELS[model_type])()


def part_modules(model_type: str | None = None, part: str | None = None) -> list[str]:
    """Full names of the modules that make up the parts beside the language model, of one family or of all."""
    names: dict[str, None] = {}
    for known in _MODELS if model_type is None else (model_type,):
        for name, prefixes in _load(_MODELS[known])().parts.items():
            if part in (None, name):
                names |= dict.fromkeys(prefix.rstrip(".") for prefix in _as_tuple(prefixes))
    return list(names)


def _as_tuple(prefixes: str | tuple[str, ...]) -> tuple[str, ...]:
    return (prefixes,) if isinstance(prefixes, str) else prefixes


def register_family(processor_class: str, documents: Any, model_type: str, model: Any = None) -> None:
    """Add a family.

    Args:
        processor_class (`str`): name of its processor's class.
        documents (`type`): its [`DocumentProcessor`].
        model_type (`str`): its config's `model_type`.
        model (`type`, *optional*): its [`PackedModel`]; without it the family packs and does not train.
    """
    _DOCUMENTS[processor_class] = documents
    if model is not None:
        _MODELS[model_type] = model


def difference(planned: dict[str, Any], found: dict[str, Any]) -> str:
    """What two fingerprints differ in, for messages: `NAME 4, now 9`."""
    names = [name for name in {**planned, **found} if planned.get(name) != found.get(name)]
    return ", ".join(f"{name} {planned.get(name)}, now {found.get(name)}" for name in names)


def _load(found: Any) -> Any:
    return getattr(import_module(found[0]), found[1]) if isinstance(found, tuple) else found
