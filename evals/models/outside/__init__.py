"""What an engine loads through SGLang's door for models from outside (SGLANG_EXTERNAL_MODEL_PACKAGE).

side_pool.py  half of a model's layers in a pool beside the KV's
"""
