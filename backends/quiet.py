"""Import this before diffusers: it keeps the notices and progress bars of the libraries out of the output."""

import diffusers.utils.logging
import transformers.utils.logging

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
diffusers.utils.logging.set_verbosity_error()
diffusers.utils.logging.disable_progress_bar()
