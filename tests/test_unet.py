"""The network against hand-written arithmetic, and the counts that the thesis and the paper print."""

import math
import re

import numpy as np
import pytest
import torch

from unet import DoubleConv, Down, SelfAttention, UNet, Up, time_embedding

# ------------------------------------------------------------------------------------------- written by hand


def group_norm(x, norm):
    """One group: every image to mean 0 and variance 1 over all its numbers, then scale and shift per channel."""
    mean, var = x.mean(dim=(1, 2, 3), keepdim=True), x.var(dim=(1, 2, 3), keepdim=True, unbiased=False)
    return (x - mean) / (var + norm.eps).sqrt() * norm.weight.view(-1, 1, 1) + norm.bias.view(-1, 1, 1)


def gelu(x):
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def conv3x3(x, weight):
    """The sum over the nine shifts of the zero-padded image."""
    H, W = x.shape[2:]
    padded = torch.zeros(*x.shape[:2], H + 2, W + 2, dtype=x.dtype)
    padded[:, :, 1:-1, 1:-1] = x
    return sum(torch.einsum("bihw,oi->bohw", padded[:, :, i : i + H, j : j + W], weight[:, :, i, j])
               for i in range(3) for j in range(3))


def double_conv(x, block):
    conv1, norm1, _, conv2, norm2 = block.net
    return group_norm(conv3x3(gelu(group_norm(conv3x3(x, conv1.weight), norm1)), conv2.weight), norm2)


def add_time(x, emb, block):
    linear = block.time[1]
    return x + (emb / (1 + torch.exp(-emb)) @ linear.weight.T + linear.bias)[:, :, None, None]


def twice(x):
    """Bilinear x2 with the corners kept: numpy's straight lines, first along one axis, then along the other."""
    def along(n):
        return torch.from_numpy(np.stack([np.interp(np.linspace(0, n - 1, 2 * n), range(n), row) for row in np.eye(n)]))
    return torch.einsum("bchw,hy,wx->bcyx", x, along(x.shape[2]), along(x.shape[3]))


# ----------------------------------------------------------------------------------------------- small things


def shaken(module, seed=0):
    """In float64, with parameters that hide nothing: a GroupNorm starts with scale 1 and shift 0."""
    g = torch.Generator().manual_seed(seed)
    module = module.double()
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=g, dtype=p.dtype))
    return module


def randn(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def one_hot(B, K, H, W, seed=2):
    ids = torch.randint(K, (B, H, W), generator=torch.Generator().manual_seed(seed))
    return (ids[:, None] == torch.arange(K)[:, None, None]).float()


def tiny(num_classes=5, **options):
    """The whole network in float32, the type of its time embedding; h = 4."""
    return shaken(UNet(num_classes, hidden_dim=4, emb_dim=8, **options)).float()


def assert_near(actual, expected):
    """The same to the rounding of float32."""
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def watch(model):
    """A list that fills with (name, inputs, output) of every direct child as the model runs."""
    seen = []
    for name, child in model.named_children():
        child.register_forward_hook(lambda _, inputs, output, name=name: seen.append((name, inputs, output)))
    return seen


def meta_unet(**options):
    """Shapes without numbers: full size at no cost."""
    with torch.device("meta"):
        return UNet(**options)


X, T = randn(3, 3, 16, 24).float(), torch.tensor([0, 7, 999])

# ------------------------------------------------------------------------------------------ counts and widths


@pytest.mark.parametrize("options, count", [
    ({}, 88_842_371),                                                          # thesis, 4.2
    ({"attention": True}, 90_816_131),                                         # paper, III-B
    ({"num_classes": 0}, 88_842_371 - (19 * 128 * 9 + 128 * 128 * 9 + 4 * 128)),  # two convolutions, two norms
])
def test_parameter_counts(options, count):
    """The network has exactly the parameters that the thesis and the paper count."""
    assert sum(p.numel() for p in meta_unet(**options).parameters()) == count


def test_widths_at_full_size():
    """The stems, each Down, the bottleneck, each Up and the output have the widths and sizes of the thesis."""
    model = meta_unet(attention=True)
    seen = watch(model)
    out = model(torch.empty(2, 3, 128, 64, device="meta"), torch.empty(2, device="meta"),
                torch.empty(2, 19, 128, 64, device="meta"))
    assert out.shape == (2, 3, 128, 64)
    assert {name: tuple(output.shape[1:]) for name, _, output in seen} == {
        "image_stem": (128, 128, 64), "mask_stem": (128, 128, 64),
        "down1": (256, 64, 32), "down2": (512, 32, 16), "down3": (512, 16, 8), "attention1": (512, 16, 8),
        "bottleneck": (512, 16, 8),
        "up1": (256, 32, 16), "attention2": (256, 32, 16), "up2": (128, 64, 32), "up3": (128, 128, 64),
        "out": (3, 128, 64),
    }
    convs = [m.weight.shape[:2] for m in model.bottleneck.modules() if isinstance(m, torch.nn.Conv2d)]
    assert [o for o, _ in convs[1::2]] == [1024, 1024, 512]  # 8h, 8h, 4h: the second convolution of each
    assert model.out.weight.shape == (3, 128, 1, 1) and model.out.bias is not None


# ------------------------------------------------------------------------------------------------- the blocks


def test_double_conv_layers():
    """A DoubleConv is convolution, norm, GELU, convolution, norm; its convolutions have no bias, its norms a scale."""
    net = DoubleConv(3, 6, mid_ch=4).net
    assert [type(m).__name__ for m in net] == ["Conv2d", "GroupNorm", "GELU", "Conv2d", "GroupNorm"]
    assert [(m.in_channels, m.out_channels, m.bias) for m in (net[0], net[3])] == [(3, 4, None), (4, 6, None)]
    assert [(m.num_channels, m.affine) for m in (net[1], net[4])] == [(4, True), (6, True)]


@pytest.mark.parametrize("hidden_dim", [128, 32, 2])
def test_one_group_at_every_width(hidden_dim):
    """Every norm takes all channels of an image together, up to 1024 of them: (x - mean) / deviation over C, H, W."""
    widths = set()
    for norm in meta_unet(hidden_dim=hidden_dim).modules():
        if isinstance(norm, torch.nn.GroupNorm):
            norm = norm.to_empty(device="cpu")
            norm.reset_parameters()
            widths.add(norm.num_channels)
            x = (randn(2, norm.num_channels, 2, 3) + torch.arange(norm.num_channels).view(-1, 1, 1)).float()
            everything = x.flatten(1).numpy()  # channels of unequal means, which groups of their own would take away
            expected = (everything - everything.mean(1, keepdims=True)) / everything.std(1, keepdims=True)
            assert_near(norm(x).flatten(1), torch.from_numpy(expected))
    assert widths == {n * hidden_dim for n in (1, 2, 4, 8)}


@pytest.mark.parametrize("residual", [False, True])
def test_double_conv_by_hand(residual):
    """A DoubleConv is its formula; the residual form adds x before one more GELU."""
    block, x = shaken(DoubleConv(4, 4, mid_ch=6, residual=residual)), randn(2, 4, 5, 7)
    expected = gelu(x + double_conv(x, block)) if residual else double_conv(x, block)
    torch.testing.assert_close(block(x), expected)


def test_down_by_hand():
    """A Down is the largest of each 2x2, a residual block, a plain one, and the time added after them."""
    block, x, emb = shaken(Down(4, 6, 8)), randn(2, 4, 6, 10), randn(2, 8, seed=3)
    small = x.reshape(2, 4, 3, 2, 5, 2).amax(dim=(3, 5))
    _, same, change = block.conv
    expected = double_conv(gelu(small + double_conv(small, same)), change)
    torch.testing.assert_close(block(x, emb), add_time(expected, emb, block))


def test_up_by_hand():
    """An Up is bilinear with kept corners, the skip connection first, mid = in / 2, and the time added at the end."""
    block, x, skip, emb = shaken(Up(8, 6, 8)), randn(2, 3, 3, 5), randn(2, 5, 6, 10, seed=4), randn(2, 8, seed=3)
    joined = torch.cat([skip, twice(x)], dim=1)
    same, change = block.conv
    assert change.net[0].out_channels == 8 // 2
    expected = double_conv(gelu(joined + double_conv(joined, same)), change)
    torch.testing.assert_close(block(x, skip, emb), add_time(expected, emb, block))


def test_time_embedding_by_hand():
    """The time embedding is the sinusoids of Vaswani et al. from 2 pi to 10000 * 2 pi, sines first, then cosines."""
    t, dim = [0, 1, 7, 999], 10
    angles = [[s / 10000 ** (2 * k / dim) for k in range(dim // 2)] for s in t]
    expected = torch.tensor([[math.sin(a) for a in row] + [math.cos(a) for a in row] for row in angles])
    torch.testing.assert_close(time_embedding(torch.tensor(t), dim), expected, atol=2e-4, rtol=0)  # float32 at 999


def test_self_attention_by_hand():
    """The attention block is norm, four heads of softmax(q k / sqrt(d)) v, then norm and two layers, both residual."""
    block, (B, C, H, W) = shaken(SelfAttention(8)), (2, 8, 2, 3)
    x = randn(B, C, H, W)

    def norm(y, layer):
        y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, keepdim=True, unbiased=False) + layer.eps).sqrt()
        return y * layer.weight + layer.bias

    y = x.reshape(B, C, H * W).permute(0, 2, 1)
    qkv = norm(y, block.norm) @ block.attention.in_proj_weight.T + block.attention.in_proj_bias
    heads = []
    for i in range(4):
        q, k, v = (part[..., 2 * i : 2 * i + 2] for part in qkv.split(C, dim=-1))
        heads.append(((q @ k.transpose(1, 2)) / math.sqrt(2)).softmax(-1) @ v)
    y = y + torch.cat(heads, -1) @ block.attention.out_proj.weight.T + block.attention.out_proj.bias
    layer_norm, first, _, second = block.linear
    y = y + gelu(norm(y, layer_norm) @ first.weight.T + first.bias) @ second.weight.T + second.bias
    torch.testing.assert_close(block(x), y.permute(0, 2, 1).reshape(B, C, H, W))


# ------------------------------------------------------------------------------------------- the whole network


def test_wiring():
    """Each part is fed by the one before it, and each Up also by the Down of its own size."""
    model = tiny(attention=True)
    seen = watch(model)
    out = model(X, T, one_hot(3, 5, 16, 24))
    inputs, outputs = {name: i for name, i, _ in seen}, {name: o for name, _, o in seen}
    x1 = inputs["down1"][0]
    for name, parts in {
        "down2": [outputs["down1"]], "down3": [outputs["down2"]], "attention1": [outputs["down3"]],
        "bottleneck": [outputs["attention1"]], "up1": [outputs["bottleneck"], outputs["down2"]],
        "attention2": [outputs["up1"]], "up2": [outputs["attention2"], outputs["down1"]],
        "up3": [outputs["up2"], x1], "out": [outputs["up3"]],
    }.items():
        assert all(torch.equal(a, b) for a, b in zip(inputs[name], parts)), name
    for name in ("down1", "down2", "down3", "up1", "up2", "up3"):
        assert_near(inputs[name][-1], time_embedding(T, 8))
    assert torch.equal(out, outputs["out"])


def test_attention_sits_where_the_paper_puts_it():
    """Attention is at 1/8 with 4h channels and at 1/4 with 2h, and nowhere where it is off."""
    model = tiny(attention=True)
    seen = []
    for module in model.modules():
        if isinstance(module, SelfAttention):
            module.register_forward_hook(lambda _, i, o: seen.append((tuple(i[0].shape), tuple(o.shape))))
    model(X, T)
    assert seen == [((3, 16, 2, 3),) * 2, ((3, 8, 4, 6),) * 2]
    assert not any(isinstance(m, SelfAttention) for m in tiny().modules())


def test_each_image_has_its_own_time():
    """Another t for one image changes the prediction for that image and for no other."""
    model = tiny()
    a, b = model(X, T), model(X, torch.tensor([0, 8, 999]))
    assert_near(a[[0, 2]], b[[0, 2]])
    assert not torch.allclose(a[1], b[1], atol=1e-2)


@pytest.mark.parametrize("num_classes, height, width", [(5, 8, 8), (1, 8, 24), (2, 32, 16), (34, 16, 8)])
def test_any_classes_and_sizes(num_classes, height, width):
    """Any number of classes, and images that are not square, give finite predictions of the same size."""
    x = randn(2, 3, height, width).float()
    out = tiny(num_classes)(x, T[:2], one_hot(2, num_classes, height, width))
    assert out.shape == x.shape and out.isfinite().all()


# ----------------------------------------------------------------------------------------------- conditioning


def test_mask_features_are_added():
    """Conditioning adds the features of the mask to those of the image, and nothing where there is no mask."""
    model, mask = tiny(), one_hot(3, 5, 16, 24)
    seen = watch(model)
    model(X, T, mask)
    outputs = {name: output for name, _, output in seen}
    entered = next(inputs[0] for name, inputs, _ in seen if name == "down1")
    assert_near(entered, double_conv(X, model.image_stem) + double_conv(mask, model.mask_stem))
    seen.clear()
    model(X, T)
    assert "mask_stem" not in [name for name, _, _ in seen]
    assert torch.equal(next(inputs[0] for name, inputs, _ in seen if name == "down1"), outputs["image_stem"])


def test_all_zero_mask_is_not_no_mask():
    """An image that is unlabelled everywhere has the features of zero planes; no mask at all adds nothing."""
    model, empty = tiny(), torch.zeros(3, 5, 16, 24)
    bias = model.mask_stem.net[-1].bias
    assert bias.abs().min() > 0.01
    assert_near(model.mask_features(empty), double_conv(empty, model.mask_stem))
    assert not torch.allclose(model(X, T, empty), model(X, T), atol=1e-2)
    nothing = torch.zeros_like(model.mask_features(empty))
    assert_near(model(X, T, features=nothing), model(X, T))


@pytest.mark.parametrize("keep", [(True, False, True), (False, False, False), (True, True, True)])
def test_keep_drops_the_mask_of_single_images(keep):
    """keep is per image: False predicts it without its mask, True with it."""
    model, mask = tiny(), one_hot(3, 5, 16, 24)
    with_mask, without = model(X, T, mask), model(X, T)
    assert not torch.allclose(with_mask, without, atol=1e-2)
    expected = torch.stack([w if k else n for k, w, n in zip(keep, with_mask, without)])
    assert_near(model(X, T, mask, keep=torch.tensor(keep)), expected)


def test_features_stand_for_the_mask():
    """Features of the mask that were computed once give the prediction of the mask at every t."""
    model, mask, runs = tiny(), one_hot(3, 5, 16, 24), []
    model.mask_stem.register_forward_hook(lambda *_: runs.append(1))
    features = model.mask_features(mask)
    outs = [model(X, t.expand(3), features=features) for t in T]
    assert len(runs) == 1
    for t, out in zip(T, outs):
        assert_near(out, model(X, t.expand(3), mask))


def test_unconditional_network():
    """num_classes=0 is the baseline without a mask stem: it predicts without a mask and refuses one."""
    model = tiny(0)
    assert model.mask_stem is None and model(X, T).shape == X.shape
    with pytest.raises(ValueError, match="num_classes=0"):
        model(X, T, one_hot(3, 5, 16, 24))


# ----------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("shape", [(1, 3, 20, 16), (1, 3, 16, 12), (1, 3, 9, 9), (1, 4, 16, 24), (3, 16, 24)])
def test_images_that_do_not_fit(shape):
    """Images of another size, number of channels or of no batch are refused with what was expected and found."""
    with pytest.raises(ValueError, match="multiples of 8.*" + re.escape(str(shape))):
        tiny()(torch.zeros(shape), T[:1])


@pytest.mark.parametrize("t, keep, name, found", [
    (T[:2], None, "t", (2,)),                              # two times for three images
    (T[0], None, "t", ()),                                 # one number
    (T[:, None], None, "t", (3, 1)),                       # would be broadcast
    (T, torch.ones(1, dtype=torch.bool), "keep", (1,)),    # one coin for the whole batch
    (T, torch.ones(3, 1, dtype=torch.bool), "keep", (3, 1)),
])
def test_values_per_image_that_do_not_fit(t, keep, name, found):
    """t and keep must have one value per image; nothing is broadcast."""
    with pytest.raises(ValueError, match=rf"{name} must.*\(3,\).*" + re.escape(str(found))):
        tiny()(X, t, one_hot(3, 5, 16, 24), keep=keep)


@pytest.mark.parametrize("shape, expected, found", [
    ((3, 4, 16, 24), "(B, 5, H, W)", "(3, 4, 16, 24)"),    # another number of classes
    ((3, 16, 24), "(B, 5, H, W)", "(3, 16, 24)"),          # class ids, not one-hot
    ((3, 5, 24), "(B, 5, H, W)", "(3, 5, 24)"),            # three dimensions of which one is K by chance
    ((3, 5, 16, 16), "(3, 4, 16, 24)", "(3, 4, 16, 16)"),  # another size: the features are named, h = 4
    ((1, 5, 16, 24), "(3, 4, 16, 24)", "(1, 4, 16, 24)"),  # one mask for three images
])
def test_masks_that_do_not_fit(shape, expected, found):
    """A wrong mask is refused with what was expected and found; nothing is broadcast."""
    with pytest.raises(ValueError, match="mask.*" + re.escape(expected) + ".*" + re.escape(found)):
        tiny()(X, T, torch.zeros(shape))


def test_mask_and_features_together():
    """A mask and features at once are refused, and features that are of another width."""
    model, mask = tiny(), one_hot(3, 5, 16, 24)
    with pytest.raises(ValueError, match="mask or features"):
        model(X, T, mask, features=model.mask_features(mask))
    with pytest.raises(ValueError, match=r"\(3, 4, 16, 24\).*\(3, 6, 16, 24\)"):
        model(X, T, features=torch.zeros(3, 6, 16, 24))


@pytest.mark.parametrize("options", [{"hidden_dim": 5}, {"emb_dim": 7}])
def test_odd_widths(options):
    """Odd widths, which cannot be halved, are refused with the numbers that were given."""
    with pytest.raises(ValueError, match="even.*" + str(*options.values())):
        UNet(**{"hidden_dim": 4, "emb_dim": 8, **options})
