"""A YAML file of options, read without running, building or expanding anything: scalars stay as they are written."""

from pathlib import Path
from typing import Any

import yaml

_MAX_BYTES = 1 << 20
_MAX_NODES = 100_000  # with every alias counted as often as it stands


class YamlOptionsError(ValueError):
    """A file that holds no options; its text is one line."""


def read_options(path: str) -> dict[str, yaml.Node]:
    """The top-level `option: value` nodes of a file."""
    try:
        if Path(path).stat().st_size > _MAX_BYTES:
            raise YamlOptionsError(f"{path} is larger than 1 MiB, which no file of options is")
        root = yaml.compose(Path(path).read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise YamlOptionsError(f"cannot read {path}: {' '.join(str(error).split())}") from error
    except RecursionError:
        raise YamlOptionsError(f"cannot read {path}: nested too deeply") from None
    if not isinstance(root, yaml.MappingNode):
        raise YamlOptionsError(f"{path}: not a YAML file of `option: value` lines")
    if _expanded_size(root, {}) > _MAX_NODES:
        raise YamlOptionsError(f"cannot read {path}: its aliases stand for more than {_MAX_NODES:,} values")
    options: dict[str, yaml.Node] = {}
    for key, value in root.value:
        if not isinstance(key, yaml.ScalarNode):
            raise YamlOptionsError(f"{path}: an option's name must be a word")
        if key.value in options:
            raise YamlOptionsError(f"{path}: {key.value!r} is given twice")
        options[key.value] = value
    return options


def _expanded_size(node: yaml.Node, sizes: dict[int, float]) -> float:
    """Nodes below and with one, aliases followed; infinite where one stands for itself."""
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) not in sizes:
        sizes[id(node)] = float("inf")  # until it is known
        pairs = isinstance(node, yaml.MappingNode)
        children = [child for pair in node.value for child in pair] if pairs else node.value
        sizes[id(node)] = 1 + sum(_expanded_size(child, sizes) for child in children)
    return sizes[id(node)]


def plain_value(node: yaml.Node) -> Any:
    """None, the text of a scalar as written (so that `no` is a word and `5e-5` a number), or a list or dict."""
    if isinstance(node, yaml.ScalarNode):
        if node.tag == "tag:yaml.org,2002:null":
            return None
        if not node.tag.startswith("tag:yaml.org,2002:"):
            raise YamlOptionsError(f"the tag {node.tag} is not allowed")
        return node.value
    loader = yaml.SafeLoader("")
    try:
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        raise YamlOptionsError(" ".join(str(error).split())) from error
    finally:
        loader.dispose()
