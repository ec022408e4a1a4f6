"""Detection data: KITTI, COCO and synthetic road scenes, all read into one dataset class."""

from .dataset import DetectionDataset, collate
from .load import load_dataset
from .records import Annotation, BadDataError, Item, Problem
from .transforms import Augment, sample_seed

__all__ = ["Annotation", "Augment", "BadDataError", "DetectionDataset", "Item", "Problem", "collate", "load_dataset", "sample_seed"]
