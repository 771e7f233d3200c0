"""Start of the application, as MONAI Deploy's packager expects it."""

from app import main

if __name__ == "__main__":
    main()
