"""Layer-wise Integrated Gradients between the token vectors inside transformer blocks.

The public names stand in `__init__.pyi` and are resolved on first use, so that importing the package, or asking the
command line for help, loads no torch.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
