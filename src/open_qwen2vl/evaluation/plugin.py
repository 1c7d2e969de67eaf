"""What lmms-eval's entry point `lmms_eval.models` finds: `python -m lmms_eval --model open_qwen2vl`."""


def manifests() -> list:
    """The models that this package adds to lmms-eval."""
    from lmms_eval.models.registry_v2 import ModelManifest

    module = "open_qwen2vl.evaluation.lmms_model"
    return [
        ModelManifest(
            model_id="open_qwen2vl",
            chat_class_path=f"{module}.TransformersModel",
            simple_class_path=f"{module}.SimpleTransformersModel",
        )
    ]
