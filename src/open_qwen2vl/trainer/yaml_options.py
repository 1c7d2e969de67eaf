"""A YAML file of options, read without running, building or expanding anything: scalars stay as they are written."""

from typing import Any

import yaml

from ..options import compose_yaml


class YamlOptionsError(ValueError):
    """A file that holds no options; its text is one line."""


def read_options(path: str) -> dict[str, yaml.Node]:
    """The top-level `option: value` nodes of a file."""
    try:
        root = compose_yaml(f"cannot read {path}", path)
    except OSError as error:
        raise YamlOptionsError(f"cannot read {path}: {error}") from error
    except ValueError as error:
        raise YamlOptionsError(str(error)) from error
    if not isinstance(root, yaml.MappingNode):
        raise YamlOptionsError(f"{path}: not a YAML file of `option: value` lines")
    options: dict[str, yaml.Node] = {}
    for key, value in root.value:
        if not isinstance(key, yaml.ScalarNode):
            raise YamlOptionsError(f"{path}: an option's name must be a word")
        if key.value in options:
            raise YamlOptionsError(f"{path}: {key.value!r} is given twice")
        options[key.value] = value
    return options


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
