// What only a pool shows, and has done: what its size tolerates, its load balancer, and the form that adds members. Must
// never add a host whose fingerprint nobody has compared.

import { part, post, remove } from './api.js';
import { h } from './dom.js';
import { live } from './live.js';
import { card, confirm, field, form, toast } from './parts.js';
import { count, sizeOf } from './words.js';

// HA mode has exactly three members.
export const isPool = (status) => sizeOf(status).most > sizeOf(status).least;

const majority = (voters) => Math.floor(voters / 2) + 1;

// What a pool with all members up tolerates, and a word of advice on its size.
export function worth(status) {
  const members = status.members.length;
  const { least, most } = sizeOf(status);
  const failures = Math.max(0, members - majority(members));
  const fact = `${count(members, 'member')}, of which ${majority(members)} must be up: with all of them up, ${count(failures, 'failure')} ${failures === 1 ? 'is' : 'are'} tolerated.`;
  if (members < least) return `${fact} A pool has ${least} to ${most} members: add ${least - members} more.`;
  if (members % 2 === 0) return `${fact} ${members - 1} members tolerate as many: an odd number is better.`;
  return fact;
}

function balancing(status, may) {
  const address = status.membership.pool?.load_balancer ?? '';
  const shown = h('p', {}, 'Load balancer: ', address ? h('strong', { class: 'mono', id: 'load-balancer' }, address) : h('span', { class: 'quiet' }, 'none'));
  const send = async ({ balancer }, element) => {
    const { loadBalancerAddress } = await post('/clustered-db/settings', { loadBalancerAddress: balancer.trim() });
    element.reset();
    toast(loadBalancerAddress ? `All Consoles' certificates are good for ${loadBalancerAddress}` : 'There is no load balancer any more');
  };
  const input = field('Host name or IP address, without a port', 'balancer', {
    autocomplete: 'off', spellcheck: 'false', class: 'mono', hint: 'It becomes one of the names of all Consoles\' certificates. Empty: there is none.',
  });
  return [shown, may && form('Save the load balancer', send, input, { kind: 'plain' })];
}

// The size and the load balancer.
export function pool(status, may) {
  return card('Pool', {}, h('p', { id: 'pool-size' }, worth(status)), balancing(status, may));
}

// The form that takes hosts in.
export function adding(status, may) {
  if (live.stale) return card('Add members', {}, h('p', {}, 'Unknown: no PRIMARY answers. Members can be added when there is one again.'));
  const { most } = sizeOf(status);
  if (status.members.length >= most) return card('Add members', {}, h('p', {}, `The pool is complete: it has ${most} members. Remove one (✕) to add another.`));
  if (!may) return card('Add members', {}, h('p', {}, 'Only an Administrator can add members.'));
  const send = async (values, element) => {
    const [address, fingerprint] = [values.address.trim(), values.fingerprint.trim()];
    if (!address || !fingerprint) throw new Error('Enter the address and the fingerprint.');
    await post('/clustered-db/members', { members: [{ address, fingerprint }] });
    element.reset();
    toast(`${address} is added: it becomes SECONDARY when it has caught up`);
  };
  const fields = [
    field('Address of the new member', 'address', { autocomplete: 'off', spellcheck: 'false', class: 'mono', hint: 'A host on which twistlockd waits for a pool.' }),
    field('Its fingerprint', 'fingerprint', {
      autocomplete: 'off', spellcheck: 'false', class: 'mono', hint: 'As `twistcli clustered-db fingerprint` shows it on that host.',
    }),
  ];
  return card('Add members', {}, form('Add', send, fields));
}

// Asks, and removes a member. Never by force: a majority of the others must be up.
export function removeFromPool(member, status) {
  const left = status.members.length - 1;
  const known = status.membership.members.find(({ id }) => id === member.id);
  const failures = Math.max(0, left - majority(left));
  const content = [
    h('p', {}, `${member.name} (${member.address}) leaves the pool and keeps no vote. It serves nothing any more, and its data stay on its disk.`),
    h('p', {}, `${count(left, 'member')} remain: ${count(failures, 'failure')} tolerated with all of them up.`),
  ];
  return confirm(`Remove ${member.name}?`, content, 'Remove', async () => {
    await remove(`/clustered-db/members/${part(`${known.address.includes(':') ? `[${known.address}]` : known.address}:${known.port}`)}`);
    toast(`${member.name} is removed`);
  }, { kind: 'danger', typed: member.name });
}
