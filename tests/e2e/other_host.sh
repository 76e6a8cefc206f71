# SPDX-License-Identifier: Apache-2.0
# Makes a container the second compute host of $CLOUD, given its nova-compute's options and driver as text.
set -e

python=/usr/bin/python3
[ "$CLOUD" != 34 ] || python=/opt/nova-34/bin/python
mkdir -p /etc/nova/lab.d
echo "$OPTIONS" > /etc/nova/lab.d/other_host.conf
drivers=$($python -c 'import nova.virt; print(nova.virt.__path__[0])')
mkdir "$drivers/other_host"
echo "$DRIVER" > "$drivers/other_host/__init__.py"
export PYTHONPATH=/src
exec sh /usr/local/share/lab/setup compute
