"""The bundle in other programs: ``python scripts/runtimes COMMAND [options]``; MONAI Deploy: ``deploy_app``."""
