"""Entry point of the executable: make blocking calls cooperative, then run the command line."""

from gevent import monkey

monkey.patch_all()

from fzg.cli import main  # noqa: E402

if __name__ == "__main__":
    main()
