"""The PyTorch side of `cargo xtask bench`: one distillation step on a CPU, in blocks that are asked for.

    python torch_kd.py step --teacher resnet56 --student resnet20 --mode channels_last --threads 2
    python torch_kd.py convs 16,16,3,1,1,32 32,64,3,2,1,16

`step` builds, warms up and prints a line of JSON; then each line on standard input ("block SECONDS") runs steps for about so many
seconds and prints what they took, until standard input ends. So a caller can take turns between several of these and another program.

A step is the teacher's forward pass (evaluation mode, no gradient), the student's forward and backward pass in training mode, 0.1 cross-entropy
+ 0.9 KL at temperature 4, and SGD with momentum and weight decay, on random 3x32x32 images (224x224 with --size).

modes   eager           f32, NCHW
        channels_last   f32, channels last
        compile         f32, channels last, torch.compile
        bf16            bf16 autocast, channels last
        bf16_compile    bf16 autocast, channels last, torch.compile
        teacher_bf16    as channels_last with a teacher under bf16 autocast
The teacher's batch norms are folded into its convolutions (not with --unfolded): the fastest way that PyTorch has.
"""
import argparse
import json
import resource
import statistics
import sys
import time

import torch
import torch.nn.functional as F
from torch import nn


# ------------------------------------------------------------------------------------------------ networks
def conv_bn(inputs, outputs, kernel=3, stride=1, groups=1, relu=True):
    layers = [nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False), nn.BatchNorm2d(outputs)]
    return nn.Sequential(*layers, nn.ReLU(inplace=True)) if relu else nn.Sequential(*layers)


class Residual(nn.Module):
    """Two convolutions with a shortcut, ReLU after the sum."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.main = nn.Sequential(conv_bn(inputs, outputs, 3, stride), conv_bn(outputs, outputs, relu=False))
        self.short = conv_bn(inputs, outputs, 1, stride, relu=False) if stride > 1 or inputs != outputs else nn.Identity()

    def forward(self, x):
        return F.relu(self.main(x) + self.short(x))


class PreActivation(nn.Module):
    """The block of wide residual networks: norm and ReLU before each convolution."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.short = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if inputs != outputs else None

    def forward(self, x):
        a = F.relu(self.norm1(x))
        y = self.conv2(F.relu(self.norm2(self.conv1(a))))
        return y + (x if self.short is None else self.short(a))


class Inverted(nn.Module):
    """The block of MobileNetV2 as the CIFAR zoo has it (ReLU, not ReLU6)."""

    def __init__(self, inputs, outputs, stride, factor):
        super().__init__()
        wide = inputs * factor
        self.add = stride == 1 and inputs == outputs
        self.main = nn.Sequential(
            conv_bn(inputs, wide, 1), conv_bn(wide, wide, 3, stride, groups=wide), conv_bn(wide, outputs, 1, relu=False))

    def forward(self, x):
        return x + self.main(x) if self.add else self.main(x)


def shuffle(x):
    n, c, h, w = x.shape
    return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


class Shuffle(nn.Module):
    """The unit of ShuffleNetV2; with stride 2 both halves see the whole input."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        half = outputs // 2
        self.half, self.stride = half, stride
        first = half if stride == 1 else inputs
        self.right = nn.Sequential(
            conv_bn(first, half, 1), conv_bn(half, half, 3, stride, groups=half, relu=False), conv_bn(half, half, 1))
        self.left = None
        if stride == 2:
            self.left = nn.Sequential(conv_bn(inputs, inputs, 3, 2, groups=inputs, relu=False), conv_bn(inputs, half, 1))

    def forward(self, x):
        if self.left is not None:
            return shuffle(torch.cat([self.left(x), self.right(x)], 1))
        return shuffle(torch.cat([x[:, : self.half], self.right(x[:, self.half:])], 1))


def head(layers, width, classes):
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))


def stages(block, stem, widths, blocks, first=1):
    layers, width = [], stem
    for stage, outputs in enumerate(widths):
        for i in range(blocks if isinstance(blocks, int) else blocks[stage]):
            layers.append(block(width, outputs, 2 if stage >= first and i == 0 else 1))
            width = outputs
    return layers, width


def network(name, classes):
    if name in ("resnet18", "resnet34"):
        layers, width = stages(Residual, 64, (64, 128, 256, 512), 2 if name == "resnet18" else (3, 4, 6, 3))
        return head([conv_bn(3, 64, 7, 2), nn.MaxPool2d(3, 2, 1), *layers], width, classes)
    if name.startswith("resnet"):
        depth, _, factor = name[6:].partition("x")
        widths = (32, 64, 128, 256) if factor else (16, 16, 32, 64)
        layers, width = stages(Residual, widths[0], widths[1:], (int(depth) - 2) // 6)
        return head([conv_bn(3, widths[0]), *layers], width, classes)
    if name.startswith("wrn_"):
        depth, factor = (int(n) for n in name[4:].split("_"))
        layers, width = stages(PreActivation, 16, (16 * factor, 32 * factor, 64 * factor), (depth - 4) // 6)
        return head([nn.Conv2d(3, 16, 3, 1, 1, bias=False), *layers, nn.BatchNorm2d(width), nn.ReLU()], width, classes)
    if name in ("vgg8", "vgg13"):
        layers, width = [], 3
        for stage, outputs in enumerate((64, 128, 256, 512, 512)):
            for _ in range(1 if name == "vgg8" else 2):
                layers += [nn.Conv2d(width, outputs, 3, 1, 1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
                width = outputs
            layers += [nn.MaxPool2d(2)] if stage < 3 else []
        return head(layers, width, classes)
    if name == "mobilenetv2":
        layers, width = [conv_bn(3, 16, 3, 2)], 16
        for factor, outputs, count, stride in ((1, 8, 1, 1), (6, 12, 2, 1), (6, 16, 3, 2), (6, 32, 4, 2), (6, 48, 3, 1),
                                               (6, 80, 3, 2), (6, 160, 1, 1)):
            for i in range(count):
                layers.append(Inverted(width, outputs, stride if i == 0 else 1, factor))
                width = outputs
        return head([*layers, conv_bn(width, 1280, 1)], 1280, classes)
    if name == "shufflenetv2":
        layers, width = [conv_bn(3, 24, 1)], 24
        for outputs, count in ((116, 4), (232, 8), (464, 4)):
            for i in range(count):
                layers.append(Shuffle(width, outputs, 2 if i == 0 else 1))
                width = outputs
        return head([*layers, conv_bn(width, 1024, 1)], 1024, classes)
    raise SystemExit(f"{name}: no such network here")


def fold(module):
    """Batch norms folded into the convolutions right before them, in place."""
    for child in module.children():
        fold(child)
    if isinstance(module, nn.Sequential):
        for i in range(len(module) - 1):
            if isinstance(module[i], nn.Conv2d) and isinstance(module[i + 1], nn.BatchNorm2d):
                module[i] = nn.utils.fusion.fuse_conv_bn_eval(module[i], module[i + 1])
                module[i + 1] = nn.Identity()
    if isinstance(module, PreActivation):
        module.conv1 = nn.utils.fusion.fuse_conv_bn_eval(module.conv1, module.norm2)
        module.norm2 = nn.Identity()
    return module


# ------------------------------------------------------------------------------------------------ steps
def loss_of(student, teacher, labels, temperature=4.0):
    soft = F.kl_div(F.log_softmax(student / temperature, 1), F.softmax(teacher / temperature, 1), reduction="batchmean")
    return 0.1 * F.cross_entropy(student, labels) + 0.9 * temperature**2 * soft


def macs(model, size):
    """Multiply-adds of convolutions and linear layers on one image."""
    total = 0

    def count(module, _, out):
        nonlocal total
        total += out.numel() * module.weight[0].numel()

    hooks = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    was = model.training
    with torch.no_grad():
        model.eval()(torch.zeros(1, 3, size, size))
    model.train(was)
    for hook in hooks:
        hook.remove()
    return total


def say(**values):
    print(json.dumps(values), flush=True)


def run_steps(args):
    torch.manual_seed(0)
    layout = torch.contiguous_format if args.mode == "eager" else torch.channels_last
    compiled = args.mode.endswith("compile")
    bf16 = args.mode.startswith("bf16")
    student = network(args.student, args.classes).train().to(memory_format=layout)
    teacher = network(args.teacher, args.classes).eval()
    teacher = (teacher if args.unfolded else fold(teacher)).requires_grad_(False).to(memory_format=layout)
    optimiser = torch.optim.SGD(student.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4, fused=True)
    shape = (args.batch, 3, args.size, args.size)
    data = [(torch.randn(shape).contiguous(memory_format=layout), torch.randint(0, args.classes, (args.batch,))) for _ in range(4)]

    def teach(x):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16 or args.mode == "teacher_bf16"):
            return teacher(x)

    def learn(x, target, labels):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            out = student(x)
        return loss_of(out.float(), target.float(), labels)

    if compiled:
        teach, learn = torch.compile(teach), torch.compile(learn)
    clock = time.perf_counter

    def step(number):
        x, labels = data[number % len(data)]
        times = [clock()]
        target = teach(x)
        times.append(clock())
        loss = learn(x, target, labels)
        times.append(clock())
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        times.append(clock())
        optimiser.step()
        times.append(clock())
        return times

    counted = dict(teacher=macs(teacher, args.size), student=macs(student, args.size))
    begun = clock()
    for number in range(4):
        step(number)
    say(ready=True, macs=counted, torch=torch.__version__, threads=torch.get_num_threads(), warm_up_s=round(clock() - begun, 1))
    number = 0
    for line in sys.stdin:
        seconds, steps, begun = float(line.split()[1]), [], clock()
        while clock() - begun < seconds or len(steps) < 3:
            steps.append(step(number))
            number += 1
        parts = [[b - a for a, b in zip(s, s[1:])] for s in steps]
        middle = lambda values: statistics.median(values)  # noqa: E731
        ms = {name: 1e3 * middle([p[i] for p in parts]) for i, name in enumerate(("teacher", "student", "backward", "update"))}
        say(img_s=args.batch / middle([s[-1] - s[0] for s in steps]), steps=len(steps), ms=ms,
            peak_memory=1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def run_convs(args):
    """Each shape IN,OUT,K,STRIDE,GROUPS,SIZE alone, channels last: GFLOP/s forward, for the input's and for the weight's gradient."""
    rows = []
    for text in args.shapes:
        inputs, outputs, k, stride, groups, size = (int(n) for n in text.split(","))
        x = torch.randn(args.batch, inputs, size, size).contiguous(memory_format=torch.channels_last)
        w = torch.randn(outputs, inputs // groups, k, k).contiguous(memory_format=torch.channels_last)
        y = F.conv2d(x, w, None, stride, k // 2, 1, groups)
        dy = torch.randn_like(y)
        flops = 2.0 * y.numel() * w[0].numel()

        def back(which):
            return torch.ops.aten.convolution_backward(
                dy, x, w, None, [stride] * 2, [k // 2] * 2, [1, 1], False, [0, 0], groups, which)  # noqa: B023

        def rate(f):
            f(), f()
            times, begun = [], time.perf_counter()
            while time.perf_counter() - begun < args.seconds or len(times) < 5:
                one = time.perf_counter()
                f()
                times.append(time.perf_counter() - one)
            return flops / statistics.median(times) / 1e9  # noqa: B023

        with torch.no_grad():
            rows.append(dict(shape=text, fwd=rate(lambda: F.conv2d(x, w, None, stride, k // 2, 1, groups)),
                             bwd_x=rate(lambda: back([True, False, False])), bwd_w=rate(lambda: back([False, True, False]))))
    print(json.dumps(rows), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=64)
    commands = parser.add_subparsers(dest="what", required=True)
    step = commands.add_parser("step")
    step.add_argument("--teacher", required=True)
    step.add_argument("--student", required=True)
    step.add_argument("--mode", default="channels_last",
                      choices=["eager", "channels_last", "compile", "bf16", "bf16_compile", "teacher_bf16"])
    step.add_argument("--size", type=int, default=32)
    step.add_argument("--classes", type=int, default=100)
    step.add_argument("--unfolded", action="store_true")
    convs = commands.add_parser("convs")
    convs.add_argument("shapes", nargs="+")
    convs.add_argument("--seconds", type=float, default=0.15)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    {"step": run_steps, "convs": run_convs}[args.what](args)


if __name__ == "__main__":
    main()
