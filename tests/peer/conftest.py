"""Marks of transformers' tests, which pytest would refuse as unknown."""

MARKS = "accelerate_tests bitsandbytes flash_attn_test flash_attn_3_test flash_attn_4_test generate torch_compile_test"
MARKS += " torch_export_test flex_attention_test is_pipeline_test is_tensor_parallel_test is_training_test fsdp_test"


def pytest_configure(config) -> None:
    """Register them."""
    for name in MARKS.split():
        config.addinivalue_line("markers", f"{name}: of transformers")
