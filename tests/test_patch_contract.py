"""What patch_model and unpatch_model promise about the model around the layers."""

import copy
import gc
import io
import pickle
import threading
import weakref

import pytest
import torch
from sparse_attn_modules.patching import patch_model, patch_report, unpatch_model
from torch import nn

from sparse_attn_modules.modules import SAMAttentionSparse, SparseMultiheadAttention, ViTSparseAttention
from sparse_attn_modules.patterns import CustomPattern, Dense, LocalWindow, MultiScale, Random

timm = pytest.importorskip("timm")

VIT = {"patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 5}
IMAGE = (1, 3, 68, 160)  # 17 × 40 patches in 3 × 3 tiles, the last ones partial


def vit(**arguments) -> nn.Module:
    return random_weights(timm.create_model("vit_tiny_patch16_224", img_size=IMAGE[2:], **{**VIT, **arguments}))


def eva(**arguments) -> nn.Module:
    """Its attention has parameters and a buffer that belong to no submodule."""
    return random_weights(timm.create_model("eva02_tiny_patch14_224", img_size=IMAGE[2:], **{**VIT, **arguments}))


def samvit() -> nn.Module:
    arguments = {**VIT, "window_size": 7, "global_attn_indexes": (1,)}
    return random_weights(timm.create_model("samvit_base_patch16", img_size=IMAGE[2:], **arguments))


def torchvision_vit() -> nn.Module:
    torchvision = pytest.importorskip("torchvision")
    return random_weights(torchvision.models.VisionTransformer(132, 4, 2, 2, 32, 64, num_classes=5))


MODELS = {"vit": vit, "eva": eva, "samvit": samvit, "torchvision": torchvision_vit}
SIZES = {"vit": IMAGE, "eva": IMAGE, "samvit": IMAGE, "torchvision": (1, 3, 132, 132)}
SPARSE = LocalWindow(density=0.3)


def random_weights(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


def layers(model: nn.Module) -> list[nn.Module]:
    replacements = (ViTSparseAttention, SAMAttentionSparse, SparseMultiheadAttention)
    return [module for module in model.modules() if isinstance(module, replacements)]


def modules(model: nn.Module) -> dict[str, nn.Module]:
    return dict(model.named_modules(remove_duplicate=False))


def assert_same_modules(found: dict[str, nn.Module], expected: dict[str, nn.Module]) -> None:
    assert list(found) == list(expected)
    assert all(found[name] is expected[name] for name in expected)


@pytest.fixture(params=MODELS)
def case(request) -> tuple[nn.Module, torch.Tensor]:
    return MODELS[request.param](), torch.randn(SIZES[request.param])


def test_unpatching_gives_back_the_very_objects(case):
    model, x = case
    before, hooks = modules(model), {name: len(module._forward_hooks) for name, module in model.named_modules()}
    expected = model(x)
    patch_model(model, SPARSE)
    assert layers(model)
    assert not torch.allclose(model(x), expected)
    assert unpatch_model(model) is model
    assert_same_modules(modules(model), before)
    assert {name: len(module._forward_hooks) for name, module in model.named_modules()} == hooks
    torch.testing.assert_close(model(x), expected, atol=0, rtol=0)
    assert_same_modules(modules(unpatch_model(model)), before)


def test_patching_twice_is_patching_once(case):
    model, x = case
    patch_model(model, SPARSE)
    once, out = modules(model), model(x)
    assert_same_modules(modules(patch_model(model, SPARSE)), once)
    torch.testing.assert_close(model(x), out, atol=0, rtol=0)


def test_patching_again_starts_from_the_originals(case):
    model, x = case
    before, expected = modules(model), copy.deepcopy(model)
    patch_model(model, SPARSE)
    patch_model(model, Random(density=0.4), compute_dtype=torch.float64)
    torch.testing.assert_close(model(x), patch_model(expected, Random(density=0.4), compute_dtype=torch.float64)(x))
    assert all(layer.compute_dtype == torch.float64 for layer in layers(model))
    assert_same_modules(modules(unpatch_model(model)), before)


def test_layers_that_the_last_call_does_not_select_are_originals_again():
    model = vit()
    before = modules(model)
    patch_model(model, SPARSE)
    patch_model(model, SPARSE, include="blocks.1.attn")
    after = modules(model)
    assert [name for name in after if isinstance(after[name], ViTSparseAttention)] == ["blocks.1.attn"]
    assert after["blocks.0.attn"] is before["blocks.0.attn"]


def test_patching_again_after_a_pattern_was_assigned():
    model = patch_model(vit(), SPARSE)
    model.blocks[0].attn.pattern = Dense()
    patch_model(model, SPARSE)
    assert [row.pattern for row in patch_report(model).layers] == [SPARSE] * 3


def test_state_dict_keys_and_parameters_stay(case):
    model, _ = case
    keys, parameters = list(model.state_dict()), dict(model.named_parameters())
    for step in (lambda: patch_model(model, SPARSE), lambda: unpatch_model(model)):
        step()
        assert list(model.state_dict()) == keys
        found = dict(model.named_parameters())
        assert list(found) == list(parameters)
        assert all(found[name] is parameters[name] for name in found)
        assert len(list(model.parameters())) == len(parameters)


@pytest.mark.parametrize("name", MODELS)
def test_checkpoints_load_both_ways(name):
    original, other, x = MODELS[name](), MODELS[name](), torch.randn(SIZES[name])
    expected = original(x)
    patch_model(other).load_state_dict(original.state_dict())
    torch.testing.assert_close(other(x), expected, atol=1e-4, rtol=1e-4)
    third = MODELS[name]()
    third.load_state_dict(other.state_dict())
    torch.testing.assert_close(third(x), expected, atol=0, rtol=0)


def through_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def through_torch_save(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle, through_torch_save])
def test_copies_work_and_are_independent(case, copied):
    model, x = case
    keys = list(model.state_dict())
    original = copy.deepcopy(model)
    patch_model(model, SPARSE)
    expected = model(x)
    other = copied(model)
    assert list(other.state_dict()) == keys
    torch.testing.assert_close(other(x), expected, atol=0, rtol=0)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    torch.testing.assert_close(model(x), expected, atol=0, rtol=0)
    # The copy can be unpatched, and has then the parameters it has now.
    with torch.no_grad():
        for parameter in original.parameters():
            parameter.mul_(1.1)
    unpatch_model(other)
    assert not layers(other)
    torch.testing.assert_close(other(x), original(x))
    assert layers(model)


def test_a_copy_follows_its_own_grid():
    model = patch_model(vit(dynamic_img_size=True), SPARSE)
    model(torch.randn(IMAGE))
    other = copy.deepcopy(model)
    other(torch.randn(1, 3, 100, 128))
    assert {layer.grid for layer in layers(other)}.isdisjoint({layer.grid for layer in layers(model)})
    assert patch_report(model).layers[0].grid.num_patches == 17 * 40
    assert patch_report(other).layers[0].grid.num_patches == 25 * 32


@pytest.mark.parametrize("name", ["eva", "samvit"])
def test_changes_made_in_between_are_carried_back(name):
    model, x = MODELS[name](), torch.randn(SIZES[name]).double()
    reference = copy.deepcopy(model).double()
    patch_model(model).double()
    with torch.no_grad():
        for changed in (model, reference):
            for parameter in changed.parameters():
                parameter.mul_(1.05)
    model.train()
    unpatch_model(model)
    assert all(module.training for module in model.modules())
    assert {tensor.dtype for tensor in (*model.parameters(), *model.buffers()) if tensor.is_floating_point()} == {
        torch.float64
    }
    torch.testing.assert_close(model.eval()(x), reference(x))


def test_mode_stays(case):
    model, _ = case
    names = [name for name, _ in model.named_modules() if name.endswith(("attn", "self_attention"))]
    model.get_submodule(names[0]).train()
    expected = {name: module.training for name, module in model.named_modules()}
    assert sum(expected[name] for name in names) == 1
    patch_model(model)
    assert {name: module.training for name, module in model.named_modules()} == expected


def test_mode_dtype_and_requires_grad_stay():
    model = vit(attn_drop_rate=0.3).double().train()
    model.blocks[1].attn.eval()
    model.blocks[2].attn.qkv.weight.requires_grad_(False)
    patch_model(model)
    assert [block.attn.training for block in model.blocks] == [True, False, True]
    assert [block.attn.qkv.weight.requires_grad for block in model.blocks] == [True, True, False]
    assert model(torch.randn(IMAGE, dtype=torch.float64)).dtype == torch.float64
    assert not any(module.training for module in model.eval().modules())


def test_hooks_stay_and_their_handles_work():
    model = vit()
    attention = model.blocks[0].attn
    calls = []
    handles = [
        attention.register_forward_hook(lambda module, args, out: calls.append(("forward", module))),
        attention.register_forward_hook(
            lambda module, args, kwargs, out: calls.append(("with kwargs", sorted(kwargs))), with_kwargs=True
        ),
        attention.register_forward_pre_hook(lambda module, args: calls.append(("pre", module))),
        attention.register_full_backward_hook(lambda module, gradient, _: calls.append(("backward", module))),
        attention.register_state_dict_post_hook(lambda *_: calls.append(("state_dict", None))),
    ]
    patch_model(model, SPARSE)
    new = model.blocks[0].attn
    model(torch.randn(IMAGE)).sum().backward()
    model.state_dict()
    assert calls == [
        ("pre", new),
        ("forward", new),
        ("with kwargs", ["attn_mask", "is_causal"]),
        ("backward", new),
        ("state_dict", None),
    ]
    added = new.register_forward_hook(lambda *_: calls.append(("added", None)))
    for handle in handles:
        handle.remove()
    calls.clear()
    model(torch.randn(IMAGE))
    assert calls == [("added", None)]
    unpatch_model(model)
    model(torch.randn(IMAGE))
    assert calls == [("added", None)] * 2
    added.remove()
    assert not attention._forward_hooks


def test_attributes_that_other_code_reads_stay(case):
    model, _ = case
    before = {name: module for name, module in model.named_modules() if hasattr(module, "num_heads")}
    patch_model(model)
    for name, original in before.items():
        new = model.get_submodule(name)
        for attribute in vars(original):
            if not attribute.startswith("_"):
                assert getattr(new, attribute) == getattr(original, attribute), attribute


def test_a_shared_layer_stays_shared():
    model = vit()
    model.blocks[2].attn = model.blocks[0].attn
    before, x = modules(model), torch.randn(IMAGE)
    expected = model(x)
    patch_model(model)
    assert model.blocks[2].attn is model.blocks[0].attn
    assert len(layers(model)) == 2
    torch.testing.assert_close(model(x), expected, atol=1e-4, rtol=1e-4)
    assert_same_modules(modules(unpatch_model(model)), before)


def test_a_layer_shared_by_two_models_is_left_alone():
    first, second = vit(), vit()
    second.blocks[0].attn = first.blocks[0].attn
    pair = nn.ModuleList([first, second])
    patch_model(pair)
    assert len(layers(pair)) == 4
    assert {row.name: row.reason for row in patch_report(pair).left_alone} == dict.fromkeys(
        ("0.blocks.0.attn", "1.blocks.0.attn"), "it is shared by models with grids of their own"
    )


@pytest.mark.parametrize("level", ["blocks", "block"])
def test_blocks_shared_by_two_models_are_left_alone(level):
    first, second = vit(), vit()
    if level == "blocks":
        second.blocks = first.blocks
        shared = ("0.blocks.0.attn", "0.blocks.1.attn", "0.blocks.2.attn")
    else:
        second.blocks[2] = first.blocks[1]
        shared = ("0.blocks.1.attn",)
    pair = nn.ModuleList([first, second])
    patch_model(pair, SPARSE, strict=False)
    assert {row.name: row.reason for row in patch_report(pair).left_alone} == dict.fromkeys(
        shared, "it is shared by models with grids of their own"
    )
    assert len(layers(pair)) == (0 if level == "blocks" else 4)


def test_a_second_name_for_a_part_of_the_model_changes_nothing():
    model, x = vit(), torch.randn(IMAGE)
    expected = patch_model(copy.deepcopy(model), SPARSE)(x)
    model.alias = model.blocks
    model.itself = nn.ModuleList([model])
    patch_model(model, SPARSE)
    assert [row.name for row in patch_report(model).layers] == [f"blocks.{index}.attn" for index in range(3)]
    assert patch_report(model).left_alone == ()
    torch.testing.assert_close(model(x), expected)


def test_include_by_globs_or_a_function():
    def patched(include) -> list[str]:
        model = patch_model(vit(), SPARSE, include=include)
        return [name for name, module in model.named_modules() if isinstance(module, ViTSparseAttention)]

    assert patched("blocks.[12].*") == ["blocks.1.attn", "blocks.2.attn"]
    assert patched(["*.0.attn", "*.2.attn"]) == ["blocks.0.attn", "blocks.2.attn"]
    seen = []
    assert patched(lambda name, module: seen.append(type(module)) or name == "blocks.1.attn") == ["blocks.1.attn"]
    assert set(seen) == {timm.layers.attention.Attention}


def test_patterns_by_glob_first_match_wins():
    model = patch_model(vit(), {"blocks.0.*": "dense", "blocks.[01].*": SPARSE})
    report = patch_report(model)
    assert {row.name: row.pattern for row in report.layers} == {"blocks.0.attn": Dense(), "blocks.1.attn": SPARSE}
    assert [(row.name, row.reason) for row in report.left_alone] == [("blocks.2.attn", "not selected for patching")]


def fails_on_the_second_layer(name: str, module: nn.Module) -> bool:
    if name == "blocks.1.attn":
        raise KeyError("midway")
    return True


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"pattern": "no such pattern"}, ValueError, "pattern must be one of .*'local'.* got 'no such pattern'"),
        ({"pattern": {"*.attn": "no such pattern"}}, ValueError, "pattern must be one of"),
        ({"pattern": 0.25}, TypeError, "pattern must be a Pattern or a short name, got float"),
        ({"pattern": {}}, ValueError, "pattern must name at least one layer, got an empty mapping"),
        ({"pattern": {1: "local"}}, TypeError, "pattern must hold names or globs as strings, got int"),
        ({"pattern": {"block.*": "local"}}, ValueError, "'block.*' must match the name .* blocks.0.attn, blocks.1"),
        ({"include": "blocks.9.attn"}, ValueError, "'blocks.9.attn' must match the name of an attention layer"),
        ({"include": lambda name, module: False}, ValueError, "blocks.0.attn .* not selected by include or pattern"),
        ({"include": fails_on_the_second_layer}, KeyError, "midway"),
        ({"include": 5}, TypeError, "patch_model: include must be a glob, several globs, .* got int"),
        ({"backend": "fastest"}, ValueError, "backend must be one of .* got 'fastest'"),
        ({"compute_dtype": torch.int8}, TypeError, "compute_dtype must be a floating-point dtype or None"),
        # Fits the three heads of the first layer alone.
        ({"pattern": MultiScale(densities=(0.2, 0.3, 0.4))}, ValueError, "MultiScale: heads must be at least"),
    ],
)
@pytest.mark.parametrize("patched_before", [False, True])
def test_after_an_error_the_model_is_as_it_was(arguments, error, message, patched_before):
    model = vit()
    model.blocks[0].attn = timm.layers.attention.Attention(32, 4)
    if patched_before:
        patch_model(model, SPARSE)
    before, state = modules(model), {name: dict(vars(module)) for name, module in model.named_modules()}
    hooks = {name: dict(module._forward_hooks) for name, module in model.named_modules()}
    with pytest.raises(error, match=message):
        patch_model(model, **arguments)
    assert_same_modules(modules(model), before)
    for name, module in model.named_modules():
        assert vars(module) == state[name]
        assert dict(module._forward_hooks) == hooks[name]


def test_not_strict_returns_the_model_unchanged():
    model = vit()
    before = modules(model)
    assert patch_model(model, include="nowhere", strict=False) is model
    assert_same_modules(modules(model), before)
    other = nn.Sequential(nn.Linear(3, 3))
    assert patch_model(other, strict=False) is other
    with pytest.raises(ValueError, match="must be one of"):
        patch_model(other, "no such pattern", strict=False)


def test_models_without_attention():
    with pytest.raises(ValueError, match=r"none of its modules is an attention layer"):
        patch_model(nn.Sequential(nn.Linear(3, 3)))
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got str"):
        patch_model("vit_small")


def test_an_attention_layer_by_itself_has_no_place_to_be_replaced_in():
    with pytest.raises(ValueError, match="model must contain attention layers, got one; use the from_module"):
        patch_model(vit().blocks[0].attn)
    with pytest.raises(ValueError, match="model must contain attention layers, got one"):
        patch_model(patch_model(vit()).blocks[0].attn)


def test_blocks_without_their_model_know_no_grid():
    with pytest.raises(ValueError, match=r"0.attn .*: no model around it says how its tokens lie on a grid"):
        patch_model(vit().blocks)


def test_a_layer_whose_forward_was_replaced_is_left_alone():
    model = vit()
    attention = model.blocks[1].attn
    attention.forward = attention.forward
    patch_model(model)
    assert [(row.name, row.reason) for row in patch_report(model).left_alone] == [
        ("blocks.1.attn", "its forward method has been replaced")
    ]


def test_a_subclass_of_a_known_layer_is_left_alone():
    class Special(timm.layers.attention.Attention):
        pass

    model = vit()
    model.blocks[1].attn = Special(32, 2)
    patch_model(model)
    (left,) = patch_report(model).left_alone
    assert (left.kind, left.reason) == ("timm Special", "it is a subclass of timm's Attention")


def test_layers_that_are_sparse_already_are_left_alone():
    model = vit()
    model.blocks[1].attn = ViTSparseAttention.from_module(model.blocks[1].attn)
    patch_model(model)
    (left,) = patch_report(model).left_alone
    assert left.reason == "it is block-sparse already"


@pytest.mark.parametrize("wrap", [nn.Sequential, lambda model: nn.ModuleDict({"trunk": model})])
def test_wrapped_models(wrap):
    model, x = vit(), torch.randn(IMAGE)
    expected = patch_model(copy.deepcopy(model), SPARSE)(x)
    patch_model(wrap(model), SPARSE)
    torch.testing.assert_close(model(x), expected)
    unpatch_model(wrap(model))
    assert not layers(model)


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("patch_first", [True, False])
def test_distributed_data_parallel(process_group, patch_first):
    model, x = vit(), torch.randn(IMAGE)
    expected = patch_model(copy.deepcopy(model), SPARSE)
    expected(x).square().sum().backward()
    if patch_first:
        patch_model(model, SPARSE)
    wrapped = nn.parallel.DistributedDataParallel(model)
    if not patch_first:
        patch_model(wrapped, SPARSE)
    wrapped(x).square().sum().backward()
    for (name, parameter), other in zip(model.named_parameters(), expected.parameters()):
        torch.testing.assert_close(parameter.grad, other.grad, msg=name)
    assert len(layers(unpatch_model(wrapped))) == 0


@pytest.mark.parametrize("patch_first", [True, False])
def test_lora_on_qkv(patch_first):
    peft = pytest.importorskip("peft")
    model, x = vit(), torch.randn(IMAGE)
    originals = [block.attn for block in model.blocks]
    plain = patch_model(copy.deepcopy(model))(x)
    config = peft.LoraConfig(r=4, target_modules=["qkv"], init_lora_weights=False)
    if patch_first:
        patch_model(model)
    wrapped = peft.get_peft_model(model, config)
    if not patch_first:
        patch_model(wrapped)
    assert len(layers(wrapped)) == 3
    out = wrapped(x)
    assert (out - plain).abs().max() > 1e-3
    out.sum().backward()
    trained = {name for name, parameter in wrapped.named_parameters() if parameter.grad is not None}
    assert trained == {name for name, _ in wrapped.named_parameters() if "lora_" in name}
    keys = set(wrapped.state_dict())
    unpatch_model(wrapped)
    assert [block.attn for block in model.blocks] == originals
    assert set(wrapped.state_dict()) == keys
    torch.testing.assert_close(wrapped(x), out, atol=1e-4, rtol=1e-4)


def test_lora_reaches_a_layer_that_would_read_the_weight_alone():
    peft = pytest.importorskip("peft")
    model, x = eva(qkv_fused=True), torch.randn(IMAGE)
    plain = model(x)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["qkv"], init_lora_weights=False))
    patch_model(wrapped)
    assert (wrapped(x) - plain).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["vit", "samvit", "torchvision"])
def test_compiles_as_one_graph(name):
    torch.compiler.reset()
    model, x = MODELS[name](), torch.randn(SIZES[name])
    patch_model(model, SPARSE)
    expected = model(x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)
    compiled(x).sum().backward()
    assert all(parameter.grad is not None for name, parameter in model.named_parameters() if "head" not in name)


def test_compiled_model_follows_its_grid():
    torch.compiler.reset()
    model = patch_model(vit(dynamic_img_size=True), SPARSE)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for size in ((68, 160), (160, 68), (100, 128), (68, 160)):
        x = torch.randn(1, 3, *size)
        expected = copy.deepcopy(model)(x)
        torch.testing.assert_close(compiled(x), expected)


def test_compiled_blocks_follow_the_grid_of_the_model():
    torch.compiler.reset()
    model = patch_model(vit(dynamic_img_size=True), SPARSE)
    eager = copy.deepcopy(model)
    for block in model.blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    for size in ((80, 160), (160, 80), (80, 160)):
        x = torch.randn(1, 3, *size)
        torch.testing.assert_close(model(x), eager(x))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_jit_traces():
    """Sizes are tensors then; none of them may stay behind in what follows the grid."""
    model, (x, other) = patch_model(vit(), SPARSE), torch.randn(2, *IMAGE)
    traced = torch.jit.trace(model, x)
    out = model(other)
    torch.testing.assert_close(traced(other), out)
    grads = (torch.autograd.grad(result.square().sum(), model.pos_embed) for result in (traced(other), out))
    torch.testing.assert_close(*grads)
    torch.testing.assert_close(patch_model(model)(other), unpatch_model(model)(other))


def test_exports():
    model, x = patch_model(vit(), SPARSE), torch.randn(IMAGE)
    exported = torch.export.export(model, (x,))
    torch.testing.assert_close(exported.module()(x), model(x))


def test_nothing_keeps_an_unpatched_layer_alive():
    model = patch_model(vit(), SPARSE)
    model(torch.randn(IMAGE))
    layer, source = weakref.ref(model.blocks[0].attn), weakref.ref(model.blocks[0].attn.grid)
    unpatch_model(model)
    gc.collect()
    assert layer() is None
    assert source() is None


def test_inference_mode_first_and_training_afterwards():
    model, x = patch_model(vit(), Random(density=0.37, seed=11)), torch.randn(IMAGE)
    with torch.inference_mode():
        model(x)
    model(x).sum().backward()
    assert model.blocks[0].attn.qkv.weight.grad is not None


def test_patterns_made_of_functions_work_in_threads():
    model = patch_model(vit(), CustomPattern(diagonal))
    x, found = torch.randn(IMAGE), []
    threads = [threading.Thread(target=lambda: found.append(model(x))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = model(x)
    assert len(found) == 4
    for out in found:
        torch.testing.assert_close(out, expected)


def diagonal(query_grid, key_grid, num_heads):
    return torch.eye(query_grid.num_tiles, dtype=torch.bool)[None]
