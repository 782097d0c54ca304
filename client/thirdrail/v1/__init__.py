# SPDX-License-Identifier: Apache-2.0
from thirdrail.protobuf_floor import require_floor

require_floor()
