// Manage > System > Backup & Restore: the backups of this member, and manual ones. Restoring needs a shell on the host, since it
// replaces the database under everybody: the page says the command.

import { get, list, part, patch, post, remove } from './api.js';
import { h, show } from './dom.js';
import { button, card, confirm, field, form, page, table, toast, when } from './parts.js';
import { bytes, time } from './words.js';

const ROWS = 1000;
// Between two looks at what is under way.
const PACE = 1_000;
const COLUMNS = [['Name', 'user-column'], ['Kind'], ['Made', 'time-column'], ['Version'], ['Size'], ['', 'action-column']];

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

function row(backup, reload, verify) {
  const named = (text) => `${text} ${backup.name}`;
  const small = (text, work) => button(text, work, { kind: 'small', 'aria-label': named(text) });
  return {
    key: backup.id,
    cells: [
      h('strong', {}, backup.name),
      backup.encrypted ? `${backup.kind}, encrypted` : backup.kind,
      when(backup.time),
      backup.version,
      bytes(backup.bytes),
      h('div', { class: 'actions' },
        h('a', { class: 'button small', href: `/api/v1/backups/${part(backup.id)}`, download: true, 'aria-label': named('Download') }, 'Download'),
        small('Check', () => verify(backup)),
        backup.kind === 'manual' && small('Rename', () => rename(backup, reload)),
        small('Delete', () => drop(backup, reload))),
    ],
  };
}

// How far the copies at BACKUP_URL are.
function copied({ url, running, problem, complete }) {
  if (running) return `${url}: ${running.id}, ${bytes(running.done)} of ${bytes(running.total)}`;
  if (problem) return `${url}: not complete: ${problem}`;
  return complete ? [`${url}: complete at `, time(complete)] : url;
}

// What is under way, what was done last, and what comes next.
function facts({ running, last, next, folder, free, enabled, encrypted, copies }) {
  const lines = [
    ['Folder', folder],
    ['Free space', free === null || free === undefined ? '–' : bytes(free)],
    ['Automatic backups', enabled ? ['on; the next one ', next ? time(next) : 'soon'] : 'off (DATA_RECOVERY_ENABLED)'],
    ['New backups', encrypted ? 'encrypted (BACKUP_KEY_FILE)' : 'not encrypted'],
    copies && ['Copies', copied(copies)],
    last && ['Last', [time(last.time), ' ', last.ok ? '' : 'failed: ', last.text]],
  ].filter(Boolean);
  const label = running && `${running.id}: ${running.step}`;
  return [
    running && h('p', {}, label, h('progress', { max: Math.max(1, running.total), value: running.done, 'aria-label': label })),
    h('dl', { class: 'facts' }, lines.map(([name, value]) => [h('dt', {}, name), h('dd', {}, value)])),
  ];
}

export function open(root) {
  const state = { backups: null, settings: null, problem: null };
  let timer = 0;
  const make = async ({ name }, element) => {
    const made = post('/backups', name);
    // Meanwhile, how far it is.
    timer = setTimeout(load, PACE / 2);
    await made.finally(load);
    element.reset();
    toast(state.settings?.running ? `Backup ${name} is being made` : `Backup ${name} is made`);
  };
  const verify = async (backup) => {
    try {
      await post(`/backups/${part(backup.id)}/verify`);
      toast(`${backup.name} is sound`);
    } catch (error) {
      toast(error.message, 'bad');
    }
    await load();
  };
  const creating = () => form('Back up now', make, field('Name', 'name', { maxlength: 64, autocomplete: 'off', required: true }));
  function draw() {
    const empty = state.problem ?? (state.backups ? 'There is no backup yet.' : 'Loading …');
    const rows = (state.backups ?? []).map((backup) => row(backup, load, verify));
    const restoring = [
      h('p', {}, 'A restore replaces the whole database, on all members. On the host of the PRIMARY, run:'),
      h('pre', {}, h('code', {}, 'sudo twistcli restore')),
    ];
    show(
      root,
      page(
        'Backup & Restore',
        'Each member backs its own copy up every day, and keeps daily, weekly and monthly ones. Shown are those of the PRIMARY.',
        h('div', { class: 'columns' },
          card('Manual backup', {}, creating()),
          state.settings && card('State', {}, facts(state.settings))),
        card('Backups', {}, table('Backups', COLUMNS, rows, empty)),
        card('Restore', {}, restoring),
      ),
    );
  }
  async function load() {
    clearTimeout(timer);
    try {
      state.backups = (await list('/backups', ROWS, 0)).rows;
      state.settings = await get('/settings/backup');
      state.problem = null;
    } catch (error) {
      state.problem = error.status === 404 ? 'This version makes no backups.' : error.message;
    }
    if (!root.isConnected) return;
    draw();
    if (state.settings?.running) timer = setTimeout(load, PACE);
  }
  draw();
  load();
  return () => clearTimeout(timer);
}
