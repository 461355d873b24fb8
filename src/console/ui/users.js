// Manage > Authentication > Users: who may log in, and your own password.

import { get, part, post, put, remove } from './api.js';
import { h, show } from './dom.js';
import { live } from './live.js';
import { button, card, confirm, field, form, page, table, toast, when } from './parts.js';
import { ROLES, nothing } from './words.js';

const COLUMNS = [['User'], ['Role'], ['Since'], ['', 'action-column']];

function roleField(selected) {
  return field('Role', 'role', { options: Object.entries(ROLES).map(([role, word]) => [role, word, role === selected]) });
}

function change(user, reload) {
  const content = [
    roleField(user.role),
    field('New password', 'password', { type: 'password', autocomplete: 'new-password', hint: 'Leave this empty to keep it.' }),
    h('p', { class: 'quiet' }, 'The sessions of this user end.'),
  ];
  return confirm(`Change ${user.username}`, content, 'Change', async ({ role, password }) => {
    await put('/users', { username: user.username, role, ...(password ? { password } : {}) });
    await reload();
  });
}

function drop(user, reload) {
  const content = h('p', {}, 'This user can no longer log in, and all sessions end at once.');
  return confirm(`Delete ${user.username}?`, content, 'Delete', async () => {
    await remove(`/users/${part(user.username)}`);
    await reload();
  }, { kind: 'danger' });
}

function row(user, me, reload) {
  const own = user.username === me;
  const named = (text) => `${text} ${user.username}`;
  return {
    key: user.username,
    cells: [
      [h('strong', {}, user.username), own && h('span', { class: 'quiet' }, ' you')],
      ROLES[user.role] ?? user.role,
      user.created ? when(user.created) : '–',
      h('div', { class: 'actions' },
        button('Change', () => change(user, reload), { kind: 'small', 'aria-label': named('Change') }),
        !own && button('Delete', () => drop(user, reload), { kind: 'small', 'aria-label': named('Delete') })),
    ],
  };
}

export function open(root, { user: me }) {
  const state = { users: null, problem: null };
  const add = async ({ username, password, role }, element) => {
    await post('/users', { username, password, role });
    element.reset();
    toast(`${username} can log in`);
    await load();
  };
  const adding = () => form('Add', add, [
    field('User', 'username', { maxlength: 64, autocomplete: 'off', required: true }),
    field('Password', 'password', { type: 'password', autocomplete: 'new-password', required: true, hint: 'At least 12 characters.' }),
    roleField('operator'),
  ]);
  const renew = async ({ oldPassword, newPassword, again }, element) => {
    if (newPassword !== again) throw new Error('The two new passwords differ.');
    await put('/users/password', { oldPassword, newPassword });
    element.reset();
    toast('Your password is changed');
    // All sessions of this user have ended, this one too: any request now shows the login.
    await get('/authenticate').catch(() => {});
  };
  const password = (label, name, autocomplete) => field(label, name, { type: 'password', autocomplete, required: true });
  const renewing = () => form('Change', renew, [
    // For the browser's password manager.
    h('input', { name: 'username', autocomplete: 'username', value: me.username, hidden: true, readonly: true }),
    password('Old password', 'oldPassword', 'current-password'),
    password('New password', 'newPassword', 'new-password'),
    password('New password again', 'again', 'new-password'),
  ]);
  function draw() {
    const rows = (state.users ?? []).map((user) => row(user, me.username, load));
    const empty = state.problem ?? nothing(live.stale, state.users, 'There is no user.');
    show(
      root,
      page(
        'Users',
        null,
        card('All users', {}, table('Users', COLUMNS, rows, empty)),
        h('div', { class: 'columns' }, card('Add a user', {}, adding()), card('Your own password', {}, renewing())),
      ),
    );
  }
  async function load() {
    try {
      state.users = await get('/users?limit=1000');
      state.problem = null;
    } catch (error) {
      state.problem = error.message;
    }
    draw();
  }
  draw();
  load();
  return { draw, load };
}
