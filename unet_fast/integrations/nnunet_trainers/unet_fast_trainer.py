"""Where nnU-Net finds the trainer: it imports the files of the folders in `nnUNet_extTrainer`."""

from unet_fast.integrations.nnunet import nnUNetTrainerUNetFast

__all__ = ["nnUNetTrainerUNetFast"]
