"""The command that prepares nnU-Net for the trainer of this package."""

import signal
import threading
from typing import Annotated

from cyclopts import Parameter

from .entry import app


@app.command
def nnunet(
    dataset: str = "",
    /,
    *configurations: str,
    plans: str = "nnUNetPlans",
    processes: Annotated[int, Parameter(name=["--processes", "-np"])] = 4,
) -> None:
    """Preprocess a data set of nnU-Net together with its instances (needs the extra nnunet).

    ```
    unet-fast nnunet 001 2d 3d_fullres
    ```

    The raw data set holds instance maps in instancesTr, named as the files in labelsTr. nnU-Net
    must have planned it (nnUNetv2_plan_and_preprocess). Training then takes
    `-p nnUNetPlansInstances -tr nnUNetTrainerUNetFast`.

    Without arguments, prints the folder of the trainer, which training needs in any case:
    `export nnUNet_extTrainer=$(unet-fast nnunet)`.

    Parameters
    ----------
    dataset:
        Number or name of the data set.
    configurations:
        One or more of its configurations, as 2d or 3d_fullres.
    plans:
        Name of the plans to start from.
    processes:
        Processes that preprocess at the same time.
    """
    try:
        from ..integrations.nnunet import TRAINERS, preprocess
    except ModuleNotFoundError as error:
        raise ValueError(f"nnunet needs {error.name}: pip install 'unet_fast[nnunet]'") from None
    if not dataset:
        print(TRAINERS)
        return
    if not configurations:
        raise ValueError("nnunet: configurations must be given: unet-fast nnunet 001 2d")
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # by which nnU-Net ends its forked workers
    made = preprocess(dataset, configurations, plans, processes)
    for configuration in configurations:
        print(f"nnUNetv2_train {dataset} {configuration} 0 -p {made} -tr nnUNetTrainerUNetFast")
