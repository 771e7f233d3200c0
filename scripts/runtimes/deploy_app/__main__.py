"""Start of the application, as MONAI Deploy's packager expects it."""

import os
import sys

if __name__ == "__main__":
    try:
        from app import main
    except ImportError as error:
        if os.environ.get("TRACEBACK"):
            raise
        sys.exit(
            f"error: MONAI Deploy cannot be imported ({error}): in an environment of its own, "
            "pip install -r scripts/runtimes/deploy_app/requirements.txt (bundle/docs/deploy.md)"
        )
    main()
