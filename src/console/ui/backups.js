// Manage > System > Backup & Restore: the backups of this member, and manual ones. Restoring needs a shell on the host, since it
// replaces the database under everybody: the page says the command.

import { get, part, patch, post, remove } from './api.js';
import { h, show } from './dom.js';
import { button, card, confirm, field, form, page, table, toast, when } from './parts.js';
import { bytes } from './words.js';

const COLUMNS = [['Name'], ['Kind'], ['Made'], ['Version'], ['Size'], ['Checked'], ['', 'action-column']];

function rename(backup, reload) {
  const content = field('New name', 'name', { value: backup.name, maxlength: 64, autocomplete: 'off' });
  return confirm(`Rename ${backup.name}`, content, 'Rename', async ({ name }) => {
    await patch(`/backups/${part(backup.id)}`, name);
    await reload();
  });
}

function drop(backup, reload) {
  const content = h('p', {}, 'The file is deleted. What was backed up in it can come back from other backups only.');
  return confirm(`Delete ${backup.name}?`, content, 'Delete', async () => {
    await remove(`/backups/${part(backup.id)}`);
    await reload();
  }, { kind: 'danger' });
}

async function verify(backup, reload) {
  try {
    await post(`/backups/${part(backup.id)}/verify`);
    toast(`${backup.name} is sound`);
  } catch (error) {
    toast(error.message, 'bad');
  }
  await reload();
}

function row(backup, reload) {
  const named = (text) => `${text} ${backup.name}`;
  const checked = backup.verified === undefined ? '–' : backup.verified === false ? 'failed' : 'sound';
  return {
    key: backup.id,
    cells: [
      h('strong', {}, backup.name),
      backup.kind ?? backup.type ?? '–',
      when(backup.time ?? backup.created),
      backup.version ?? backup.release ?? '–',
      backup.bytes ?? backup.size ? bytes(backup.bytes ?? backup.size) : '–',
      checked,
      h('div', { class: 'actions' },
        h('a', { class: 'button small', href: `/api/v1/backups/${part(backup.id)}`, download: true, 'aria-label': named('Download') }, 'Download'),
        button('Check', () => verify(backup, reload), { kind: 'small', 'aria-label': named('Check') }),
        button('Rename', () => rename(backup, reload), { kind: 'small', 'aria-label': named('Rename') }),
        button('Delete', () => drop(backup, reload), { kind: 'small', 'aria-label': named('Delete') })),
    ],
  };
}

export function open(root) {
  const state = { backups: null, problem: null };
  const make = async ({ name }, element) => {
    await post('/backups', name);
    element.reset();
    toast(`Backup ${name} is made`);
    await load();
  };
  const creating = () => form('Back up now', make, field('Name', 'name', { maxlength: 64, autocomplete: 'off', required: true }));
  function draw() {
    const empty = state.problem ?? (state.backups ? 'There is no backup yet.' : 'Loading …');
    const rows = (state.backups ?? []).map((backup) => row(backup, load));
    const restoring = [
      h('p', {}, 'A restore replaces the whole database, on all members. On the host of the PRIMARY, run:'),
      h('pre', {}, h('code', {}, 'sudo twistcli restore')),
    ];
    show(
      root,
      page(
        'Backup & Restore',
        'Each member backs its own copy up every day, and keeps daily, weekly and monthly ones. Shown are those of the PRIMARY.',
        card('Manual backup', {}, creating()),
        card('Backups', {}, table('Backups', COLUMNS, rows, empty)),
        card('Restore', {}, restoring),
      ),
    );
  }
  async function load() {
    try {
      state.backups = await get('/backups');
      state.problem = null;
    } catch (error) {
      state.problem = error.status === 404 ? 'This version makes no backups.' : error.message;
    }
    draw();
  }
  draw();
  load();
}
