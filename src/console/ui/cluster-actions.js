// What an administrator can do to the cluster, each behind a dialog that says what will happen. Must never act without
// one, unless it only undoes a pause or shows something.

import { get, part, post, remove } from './api.js';
import { h, show } from './dom.js';
import { check, confirm, dialog, field, form, toast } from './parts.js';
import { listed } from './words.js';

// Asks for a new invitation and returns { line, until }.
export async function joinLine() {
  return get('/high-availability/join-script');
}

function fingerprints(requests) {
  const lines = requests.map(({ name, address, fingerprint }) => [
    h('dt', {}, `${name} (${address})`),
    h('dd', { class: 'mono' }, fingerprint),
  ]);
  return h('dl', { class: 'fingerprints' }, lines);
}

export function apply(requests) {
  const content = [
    h('p', {}, 'Each host shows its fingerprint where the join line was run. Compare them:'),
    fingerprints(requests),
    h('p', {}, 'After APPLY they fetch the database, and become SECONDARY a few moments later.'),
  ];
  return confirm('Admit these hosts?', content, 'They are the same: APPLY', async () => {
    await post('/high-availability/apply', { fingerprints: requests.map((request) => request.fingerprint) });
    toast(`${listed(requests.map((request) => request.name))}: admitted`);
  });
}

export function reject({ name, address, fingerprint }) {
  const text = `${name} (${address}) is told that it may not join. With a new join line it can ask again.`;
  const content = [h('p', {}, text), h('p', { class: 'mono' }, fingerprint)];
  return confirm('Reject this host?', content, 'Reject', async () => {
    await remove(`/high-availability/requests/${part(fingerprint)}`);
    toast(`${name} is rejected`);
  }, { kind: 'danger' });
}

export function removeMember(member) {
  const content = [
    h('p', {}, `${member.name} (${member.address}) leaves the cluster for good and keeps no vote. Its data stays on its disk.`),
    h('p', {}, 'Until another host has joined (join line, then APPLY), the cluster survives fewer failures.'),
    check('Remove it even if no majority of the others answers', 'force'),
  ];
  return confirm(`Remove ${member.name}?`, content, 'Remove', async ({ force }) => {
    await remove(`/high-availability/members/${part(String(member.id))}${force ? '?force=true' : ''}`);
    toast(`${member.name} is removed`);
  }, { kind: 'danger', typed: member.name });
}

function checkList(report) {
  const lines = report.checks.map(({ name, ok, detail }) =>
    h('li', { class: ok ? 'ok' : 'bad' }, h('strong', {}, `${ok ? '✓' : '✗'} ${name}`), ` ${detail}`),
  );
  const failed = report.checks.some((check) => !check.ok);
  const end = failed ? 'The switchover cannot begin now.' : `${report.to} becomes PRIMARY. Nobody can write for a moment.`;
  return [h('ul', { class: 'checks' }, lines), h('p', {}, end)];
}

export function switchover(members) {
  const candidates = members.filter((member) => member.state === 'SECONDARY');
  return dialog('Switch over the PRIMARY role', (close) => {
    const checks = h('div', { 'aria-live': 'polite', class: 'check-area' });
    const wish = (to) => (to ? { to } : {});
    const look = async (to) => {
      const submit = checks.closest('form')?.querySelector('[type=submit]');
      if (submit) submit.disabled = true;
      show(checks, h('p', { class: 'quiet' }, 'Checking whether it can be done …'));
      try {
        const report = await post('/high-availability/switchover', { ...wish(to), dryRun: true });
        show(checks, checkList(report));
        checks.closest('form').querySelector('[type=submit]').disabled = report.checks.some((check) => !check.ok);
      } catch (error) {
        show(checks, h('p', { class: 'problem' }, error.message));
      }
    };
    look('');
    const options = [['', 'the best prepared member', true], ...candidates.map(({ name }) => [name, name])];
    const onchange = (event) => look(event.currentTarget.value);
    const start = async ({ to }) => {
      await post('/high-availability/switchover', wish(to));
      close(true);
    };
    return form('Switch over', start, [field('To', 'to', { options, onchange }), checks], { cancel: () => close(false) });
  });
}

export function pause(primary) {
  const content = [
    h('p', {}, `For maintenance: meanwhile no member takes over automatically. If ${primary} fails, the Console is down until the pause ends.`),
    field('For how many minutes', 'minutes', { type: 'number', min: 1, max: 1440, value: 30, inputmode: 'numeric' }),
  ];
  return confirm('Pause automatic takeover?', content, 'Pause', async ({ minutes }) => {
    await post('/high-availability/pause', { minutes: Number(minutes) });
    toast('Automatic takeover is paused');
  });
}

export async function resume() {
  await post('/high-availability/resume');
  toast('Automatic takeover works again');
}
