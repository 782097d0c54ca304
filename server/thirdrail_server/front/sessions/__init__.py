# SPDX-License-Identifier: Apache-2.0
"""thirdrail.v1.Sessions: the way onto the lane, who is on it, and a look at every transport."""
