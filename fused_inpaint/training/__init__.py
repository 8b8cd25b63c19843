# SPDX-License-Identifier: Apache-2.0
"""Training: so far the fit of one network to one photo (`internal`)."""
