"""Entry point of the executable: make blocking calls cooperative, then run the command line."""

from fzg import early_signals

early_signals.hold()

from gevent import monkey  # noqa: E402

monkey.patch_all()

from fzg.cli import main  # noqa: E402

if __name__ == "__main__":
    main()
