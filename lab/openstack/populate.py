# SPDX-License-Identifier: Apache-2.0
"""Fill a cloud: `identity` makes users and the catalog, `cloud` makes images and flavors; `compute` waits for it.

All can be repeated.
"""

import os
import subprocess
import sys
import time

import openstack

MIB = 1 << 20
SECTOR = 512


def identity(cloud):
    """Make the services' users, their catalog entries, and a plain tenant."""
    admin = cloud.identity

    def ensure(find, create, name, **attributes):
        return find(name) or create(name=name, **attributes)

    project = {name: ensure(admin.find_project, admin.create_project, name, domain_id='default')
               for name in ('service', 'demo')}
    role = {name: ensure(admin.find_role, admin.create_role, name)
            for name in ('admin', 'service', 'member')}
    # Nova's is long: tests look for it where it should not be.
    for name, password, project_name, roles in [
            ('nova', 'password-of-nova', 'service', ['admin', 'service']),
            ('glance', 'lab', 'service', ['admin', 'service']),
            ('placement', 'lab', 'service', ['admin', 'service']),
            ('demo', 'lab', 'demo', ['member'])]:
        user = ensure(admin.find_user, admin.create_user, name, password=password,
                      domain_id='default', default_project_id=project[project_name].id)
        for role_name in roles:
            admin.assign_project_role_to_user(project[project_name], user, role[role_name])
    for name, kind, port, path in [('nova', 'compute', 8774, '/v2.1'),
                                   ('placement', 'placement', 8778, ''),
                                   ('glance', 'image', 9292, ''),
                                   ('neutron', 'network', 9696, '')]:
        if not admin.find_service(name):
            service = admin.create_service(name=name, type=kind)
            admin.create_endpoint(service_id=service.id, interface='public', region_id='lab',
                                  url=f'http://127.0.0.1:{port}{path}')


def disk():
    """Return a disk whose guest halts at once, so that it takes no CPU."""
    size = 16 * MIB
    boot = bytearray(SECTOR)
    boot[0:4] = b'\xfa\xf4\xeb\xfd'                   # cli; hlt; jmp to hlt
    # One Linux partition after the first MiB: Glance refuses a boot sector without.
    boot[446:462] = (b'\x00\xfe\xff\xff\x83\xfe\xff\xff' + (MIB // SECTOR).to_bytes(4, 'little')
                     + ((size - MIB) // SECTOR).to_bytes(4, 'little'))
    boot[510:512] = b'\x55\xaa'
    return bytes(boot) + bytes(size - SECTOR)


def images(cloud):
    for name, disk_format, container_format in [('base', 'raw', 'bare'),
                                                ('base-ami', 'ami', 'ami')]:
        if not cloud.image.find_image(name):
            cloud.image.create_image(name, data=disk(), disk_format=disk_format,
                                     container_format=container_format, visibility='public',
                                     validate_checksum=False)


def flavors(cloud):
    for name, disk_gb in [('tiny', 1), ('big', 10)]:
        if not cloud.compute.find_flavor(name):
            cloud.compute.create_flavor(name=name, ram=64, vcpus=1, disk=disk_gb)


def host(cloud):
    """Map the host into its cell once nova-compute is up and has reported to placement."""
    services = list(cloud.compute.services(binary='nova-compute'))
    providers = list(cloud.placement.resource_providers())
    if not (any(it.state == 'up' for it in services)
            and any(list(cloud.placement.resource_provider_inventories(it)) for it in providers)):
        raise OSError('nova-compute has not reported yet')
    subprocess.run([os.environ['NOVA_BIN'] + '/nova-manage', 'cell_v2', 'discover_hosts'],
                   check=True)


def compute(cloud):
    """Return once nova-compute itself answers: sooner, it gives up servers that are about to be built."""
    (found,) = cloud.compute.get('/os-hypervisors', microversion='2.53').json()['hypervisors']
    answer = cloud.compute.get(f'/os-hypervisors/{found["id"]}/uptime', microversion='2.53')
    openstack.exceptions.raise_from_response(answer)


def retry(function, *args):
    """Repeat until the service behind answers; `lab up` bounds the time."""
    while True:
        try:
            return function(*args)
        except (openstack.exceptions.SDKException, OSError) as error:
            print(f'{function.__name__}: {error}', flush=True)
            time.sleep(1)


def main():
    cloud = openstack.connect(cloud='admin')
    if sys.argv[1] == 'identity':
        identity(cloud)
    elif sys.argv[1] == 'compute':
        retry(compute, cloud)
    else:
        retry(images, cloud)
        retry(flavors, cloud)
        retry(host, cloud)


main()
