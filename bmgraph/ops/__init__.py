"""Custom operators; importing this package registers them with torch in the namespace `bmgraph`."""

from bmgraph.ops import attention as attention
from bmgraph.ops import block_codes as block_codes
from bmgraph.ops import by_rows as by_rows
from bmgraph.ops import dropout as dropout
from bmgraph.ops import experts as experts
from bmgraph.ops import fake_quantization as fake_quantization
from bmgraph.ops import mixture as mixture
from bmgraph.ops import parallel_vocabulary as parallel_vocabulary
from bmgraph.ops import quantization as quantization
