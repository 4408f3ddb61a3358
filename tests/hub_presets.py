"""Presets of small KerasHub backbones with random weights, one of each family."""

import importlib.util

import pytest

needs_keras_hub = pytest.mark.skipif(
    importlib.util.find_spec("keras_hub") is None, reason="keras_hub is not installed: requirements-hub.txt"
)
SIDE = 64
SCALE, OFFSET = [0.01, 0.02, 0.03], [-1.0, -2.0, -3.0]
TOKENS = {"num_layers": 2, "num_heads": 2, "hidden_dim": 16}
SHAPE = {"image_shape": (SIDE, SIDE, 3)}
TOWER = {"patch_size": 16, "intermediate_dim": 32, **TOKENS, **SHAPE}
# By the name of the class: what it is built with.
SMALL = {
    "ViTBackbone": {"patch_size": 16, "mlp_dim": 32, **TOKENS, **SHAPE},
    "DeiTBackbone": TOWER,
    "DINOV2Backbone": TOWER
    | {"patch_size": 8, "position_embedding_shape": (80, 80, 3), "num_register_tokens": 2, "apply_layernorm": True},
    "DINOV3Backbone": TOWER | {"num_register_tokens": 2},
    "SigLIPVisionEncoder": TOWER,
    "CLIPVisionEncoder": TOWER,
    "SwinTransformerBackbone": {"embed_dim": 8, "depths": [2, 1], "num_heads": [2, 2], "window_size": 4, **SHAPE},
    "MiTBackbone": {
        "layerwise_depths": [1, 1],
        "num_layers": 2,
        "layerwise_num_heads": [1, 2],
        "layerwise_sr_ratios": [4, 2],
        "max_drop_path_rate": 0.0,
        "layerwise_patch_sizes": [7, 3],
        "layerwise_strides": [4, 2],
        "hidden_dims": [8, 16],
        **SHAPE,
    },
    "HGNetV2Backbone": {
        "depths": [1, 1],
        "embedding_size": 8,
        "hidden_sizes": [16, 24],
        "stem_channels": [3, 8, 8],
        "hidden_act": "relu",
        "use_learnable_affine_block": True,
        "stackwise_stage_filters": [(8, 8, 16, 1, 2, 3), (16, 8, 24, 1, 2, 3)],
        "apply_downsample": [False, True],
        "use_lightweight_conv_block": [False, True],
        **SHAPE,
    },
    "CSPNetBackbone": {
        "stem_filters": 8,
        "stem_kernel_size": 3,
        "stem_strides": 1,
        "stackwise_depth": [1, 2],
        "stackwise_strides": [2, 2],
        "stackwise_num_filters": [32, 64],
        "bottle_ratio": (0.5,),
        "block_ratio": (1.0,),
        "expand_ratio": (2.0,),
        "cross_linear": True,
        "stem_padding": "same",
        "block_type": "dark_block",
        "stage_type": "csp",
        **SHAPE,
    },
    # Without squeeze and excitation, and with relu6: EfficientNet-Lite.
    "EfficientNetBackbone": {
        "stackwise_width_coefficients": [1.0] * 2,
        "stackwise_depth_coefficients": [1.0] * 2,
        "stackwise_kernel_sizes": [3, 3],
        "stackwise_num_repeats": [1, 1],
        "stackwise_input_filters": [8, 8],
        "stackwise_output_filters": [8, 16],
        "stackwise_expansion_ratios": [1, 2],
        "stackwise_strides": [1, 2],
        "stackwise_squeeze_and_excite_ratios": [0, 0],
        "stackwise_block_types": ["v1"] * 2,
        "stackwise_force_input_filters": [0, 0],
        "stackwise_nores_option": [False] * 2,
        "dropout": 0,
        "activation": "relu6",
    },
    "MobileNetBackbone": {
        "stackwise_expansion": [[8], [16]],
        "stackwise_num_blocks": [1, 1],
        "stackwise_num_filters": [[8], [16]],
        "stackwise_kernel_size": [[3], [3]],
        "stackwise_num_strides": [[2], [2]],
        "stackwise_se_ratio": [[0.25], [None]],
        "stackwise_activation": [["relu"], ["hard_swish"]],
        "stackwise_padding": [[1], [1]],
        "output_num_filters": 24,
        "depthwise_filters": 8,
        "depthwise_stride": 2,
        "depthwise_residual": False,
        "squeeze_and_excite": 0.5,
        "last_layer_filter": 24,
        "input_num_filters": 8,
        "input_activation": "hard_swish",
        "output_activation": "hard_swish",
        **SHAPE,
    },
    "MobileNetV5Backbone": {
        "stackwise_block_types": [["er"], ["uir", "mqa"]],
        "stackwise_num_blocks": [1, 2],
        "stackwise_num_filters": [[8], [16, 16]],
        "stackwise_strides": [[2], [2, 1]],
        "stackwise_act_layers": [["gelu"], ["gelu", "gelu"]],
        "stackwise_exp_ratios": [[2.0], [2.0, 1.0]],
        "stackwise_se_ratios": [[0.0], [0.0, 0.0]],
        "stackwise_dw_kernel_sizes": [[0], [3, 0]],
        "stackwise_dw_start_kernel_sizes": [[0], [3, 0]],
        "stackwise_dw_end_kernel_sizes": [[0], [0, 0]],
        "stackwise_exp_kernel_sizes": [[3], [0, 0]],
        "stackwise_pw_kernel_sizes": [[1], [0, 0]],
        "stackwise_num_heads": [[0], [0, 2]],
        "stackwise_key_dims": [[0], [0, 8]],
        "stackwise_value_dims": [[0], [0, 8]],
        "stackwise_kv_strides": [[0], [0, 2]],
        "stackwise_use_cpe": [[False], [False, False]],
        "num_features": 24,
        "layer_scale_init_value": 0.1,
        **SHAPE,
    },
    "ResNetBackbone": {
        "input_conv_filters": [64],
        "input_conv_kernel_sizes": [7],
        "stackwise_num_filters": [64, 64],
        "stackwise_num_blocks": [1, 1],
        "stackwise_num_strides": [1, 2],
        "block_type": "basic_block",
        **SHAPE,
    },
    "XceptionBackbone": {"stackwise_conv_filters": [[8, 8], [16, 16]], "stackwise_pooling": [True, False], **SHAPE},
    "VGGBackbone": {"stackwise_num_repeats": [1, 1], "stackwise_num_filters": [8, 16], **SHAPE},
    "DenseNetBackbone": {"stackwise_num_repeats": [1, 2], "compression_ratio": 0.5, "growth_rate": 8, **SHAPE},
}


def write_preset(kind, folder, **changed):
    """Writes a preset of a class's small backbone and its image converter; returns the backbone."""
    import keras_hub

    backbone = getattr(keras_hub.models, kind)(**SMALL[kind] | changed)
    backbone.save_to_preset(str(folder))
    keras_hub.layers.ImageConverter(scale=SCALE, offset=OFFSET).save_to_preset(str(folder))
    return backbone
