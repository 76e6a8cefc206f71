# SPDX-License-Identifier: Apache-2.0
# Makes a container the second compute host of $CLOUD, given its nova-compute's options and driver as text; it has the
# network and the volumes of the cloud's own container.
set -e

share=/usr/local/share/lab
export NOVA_BIN=/usr/bin PYTHONPATH=/src
python=/usr/bin/python3
if [ "$CLOUD" = 34 ]; then
    export NOVA_BIN=/opt/nova-34/bin
    python=$NOVA_BIN/python
    cp -r /opt/nova-34/etc/nova/* /etc/nova/
fi
export PATH="$NOVA_BIN:$PATH"
mkdir -p /var/lib/nova/snapshots /etc/nova/lab.d
sed "s/CLOUD/$CLOUD/" $share/etc/nova/nova.conf > /etc/nova/nova.conf
echo "$OPTIONS" > /etc/nova/lab.d/other_host.conf
drivers=$($python -c 'import nova.virt; print(nova.virt.__path__[0])')
mkdir "$drivers/other_host"
echo "$DRIVER" > "$drivers/other_host/__init__.py"
libvirtd -d
until virsh uri; do sleep 0.3; done
virsh secret-define /etc/libvirt/secret.xml
virsh secret-set-value 5c3a3e1e-0c5f-4c5e-9d53-6f8f3c1a7b21 "$(ceph auth print-key "client.nova-$CLOUD")"
exec nova-compute --config-file /etc/nova/nova.conf --config-dir /etc/nova/lab.d
