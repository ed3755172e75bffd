"""The tiny ViT of the tests: a config that takes milliseconds."""

TINY_VIT = {
    "model_type": "vit",
    "image_size": 16,
    "patch_size": 8,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "initializer_range": 0.3,  # Spreads the features of an untrained backbone.
}
