"""Options that several commands share, with one help text each."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

from typer import Option

from .errors import UserError

DATA, MODEL, DISTILLATION, TRAINING, RUN = "Data", "Model", "Distillation", "Training", "Run"


class Format(str, Enum):
    kitti = "kitti"
    coco = "coco"
    coco_traffic = "coco-traffic"


class Mapping(str, Enum):
    strict = "strict"
    grouped = "grouped"


class Split(str, Enum):
    train = "train"
    val = "val"
    all = "all"


class Mode(str, Enum):
    inline = "inline"
    explicit = "explicit"


class TeacherWeights(str, Enum):
    softmax = "softmax"
    argmin = "argmin"
    none = "none"


class Device(str, Enum):
    auto = "auto"
    cpu = "cpu"


class Precision(str, Enum):
    no = "no"
    bf16 = "bf16"
    fp16 = "fp16"


class Detector(str, Enum):
    fcos = "fcos"
    retinanet = "retinanet"
    ssdlite = "ssdlite"
    fasterrcnn = "fasterrcnn"


FORMAT_HELP = "kitti: training/image_2 and training/label_2. coco: a COCO JSON file or its folder. coco-traffic: its 13 road classes."
MAPPING_HELP = "KITTI classes: strict ignores Van, Truck, ...; grouped counts them as Car (and Person_sitting as Pedestrian)."
SKIP_HELP = "Leave out images with problems instead of stopping; nothing is changed on disk."

DataDir = Annotated[Path | None, Option("--data", help="Folder with the data (coco: or its JSON file).", rich_help_panel=DATA)]
ValData = Annotated[
    Path | None, Option("--val-data", help="The same for validation; default: a seeded 8:2 split of --data.", rich_help_panel=DATA)
]
FormatOption = Annotated[Format | None, Option("--format", help=FORMAT_HELP, rich_help_panel=DATA)]
MappingOption = Annotated[Mapping | None, Option("--mapping", help=MAPPING_HELP, rich_help_panel=DATA)]
SkipBad = Annotated[bool | None, Option("--skip-bad", help=SKIP_HELP, rich_help_panel=DATA)]

DetectorOption = Annotated[Detector | None, Option("--detector", help="Detector of torchvision's.", rich_help_panel=MODEL)]
Backbone = Annotated[
    str | None,
    Option(
        "--backbone",
        help="slim-student or -teacher, efficientnet-lite0 or -lite2, mobilenet_v3_small or _large, resnet18, 34, 50 or 101.",
        rich_help_panel=MODEL,
    ),
]
Size = Annotated[
    str | None,
    Option(
        "--size",
        help="Shorter and longest side of the images in the detector, such as 96x320. Default: the teacher's, or the data's own size.",
        rich_help_panel=MODEL,
    ),
]
Pretrained = Annotated[
    bool | None,
    Option(
        "--pretrained/--no-pretrained",
        help="ImageNet weights for the backbone. Default: yes for efficientnet-lite (no download), else no (torchvision downloads them).",
        rich_help_panel=MODEL,
    ),
]

Teacher = Annotated[
    list[Path] | None,
    Option("--teacher", help="Run folder or checkpoint of the teacher; may be repeated for several.", rich_help_panel=DISTILLATION),
]
TeacherWeightsOption = Annotated[
    TeacherWeights | None,
    Option(
        "--teacher-weights",
        help="Of several teachers, image by image: softmax of their own negative losses (default), argmin for the best alone, none.",
        rich_help_panel=DISTILLATION,
    ),
]
Self = Annotated[
    str | None,
    Option(
        "--self",
        metavar="CHECKPOINT|ema",
        help="Self-distillation, in place of --teacher: an earlier run of the same detector, or the student's own moving average.",
        rich_help_panel=DISTILLATION,
    ),
]
Method = Annotated[
    str | None,
    Option(
        "--method",
        metavar="NAME[+NAME]",
        help="Methods that kdkernels methods lists, with the values published for the detector; gkd, gkd-imitation and bmfi with those "
        "of the demo's recipe. Default: gkd+bmfi.",
        rich_help_panel=DISTILLATION,
    ),
]
Aid = Annotated[
    bool | None, Option("--aid", help="Weigh every loss by AID: less where the teacher itself is wrong.", rich_help_panel=DISTILLATION)
]
ModeOption = Annotated[
    Mode | None,
    Option(
        "--mode",
        help="inline: inside the one backward pass. explicit: student gradients by a pass of their own.",
        rich_help_panel=DISTILLATION,
    ),
]
InitStudent = Annotated[
    bool | None,
    Option("--init-student", help="Start with the teacher's neck and head where shapes agree.", rich_help_panel=DISTILLATION),
]

Epochs = Annotated[int | None, Option("--epochs", min=1, help="Passes over the data.", rich_help_panel=TRAINING)]
Steps = Annotated[int | None, Option("--steps", min=1, help="Optimiser steps; wins over --epochs.", rich_help_panel=TRAINING)]
BatchSize = Annotated[int | None, Option("--batch-size", min=1, help="Images a process takes at a time.", rich_help_panel=TRAINING)]
Rate = Annotated[float | None, Option("--lr", help="Peak learning rate.", rich_help_panel=TRAINING)]
EmaDecay = Annotated[
    float | None, Option("--ema", help="Evaluate an average of the weights with this decay, such as 0.999.", rich_help_panel=TRAINING)
]
PrecisionOption = Annotated[Precision | None, Option("--precision", help="Mixed precision; fp16 needs a GPU.", rich_help_panel=TRAINING)]
Seed = Annotated[
    int | None, Option("--seed", min=0, help="Of the initial weights, the data order and the augmentation.", rich_help_panel=TRAINING)
]
Workers = Annotated[int | None, Option("--workers", min=0, help="Processes that load images.", rich_help_panel=TRAINING)]
DeviceOption = Annotated[Device | None, Option("--device", help="auto takes the GPU if there is one.", rich_help_panel=TRAINING)]

Config = Annotated[Path | None, Option("--config", "-c", help="YAML file; --print-config shows what one looks like.", rich_help_panel=RUN)]
Set = Annotated[
    list[str] | None,
    Option("--set", metavar="KEY=VALUE", help="Override any key, such as losses.bmfi.alpha=1e-3; may be repeated.", rich_help_panel=RUN),
]
PrintConfig = Annotated[bool, Option("--print-config", help="Print the whole configuration as YAML and stop.", rich_help_panel=RUN)]
Output = Annotated[
    Path | None,
    Option("--output", "-o", help="Run folder: configuration, logs, checkpoints, best.pt, result.json.", rich_help_panel=RUN),
]
Resume = Annotated[
    bool | None, Option("--resume", help="Continue the run in --output; its configuration is read from there.", rich_help_panel=RUN)
]


def parse_size(text: str | None) -> tuple[int | None, int | None]:
    """The text "96x320" or "320x96" as (shorter, longest) side; None as (None, None). Raises UserError."""
    if text is None:
        return None, None
    sides = text.lower().split("x")
    if len(sides) != 2 or not all(side.strip().isdigit() for side in sides):
        raise UserError(f"--size {text}: write two numbers of pixels, such as 96x320")
    short, long = sorted(int(side) for side in sides)
    return short, long
