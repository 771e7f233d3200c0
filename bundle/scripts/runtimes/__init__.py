"""The bundle inside other runtimes: MONAI Label, TensorRT, federated training."""
